"""The programs as processes of a fork server that has imported torch already, which saves seconds each.

A pytest plugin (``pytest_plugins = "fixtures_programs"``). No test here: PYTEST_DONT_REWRITE.
"""

import json
import multiprocessing
import os
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixtures_video import ROOT, fork_server, launched


def program(argv, output, env, file, before=None):
    """Be ``python FILE ARGV``, in a process group of its own; `before` is called first, and may change what it does."""
    os.setpgrp()
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(env)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # loader workers start as they do from the command line
    if before:
        before()
    sys.argv = [file, *argv]
    runpy.run_path(str(ROOT / file), run_name="__main__")


class Started:
    """A program under way, in one process or several."""

    def __init__(self, jobs):
        self.outputs = [job[1] for job in jobs]
        self.processes = [fork_server().Process(target=program, args=job) for job in jobs]
        for process in self.processes:
            process.start()
        self.pid = self.processes[0].pid

    def read(self, name, rank=0):
        """What a process has written to "out" or "err"."""
        path = Path(f"{self.outputs[rank]}.{name}")
        return path.read_text() if path.exists() else ""

    def wait_for(self, text, count=1, seconds=300):
        """Until the first process's standard output has a text so many times."""
        end, alive = time.monotonic() + seconds, True
        while self.read("out").count(text) < count:
            assert alive and time.monotonic() < end, self.read("out") + self.read("err")
            time.sleep(0.003)
            alive = self.processes[0].is_alive()

    def end(self, seconds=300):
        """Exit code, stdout and stderr of the first process; the codes and all texts of all of them."""
        for process in self.processes:
            process.join(seconds)
        self.stop()
        codes = [process.exitcode for process in self.processes]
        texts = [self.read(name, rank) for rank in range(len(codes)) for name in ("out", "err")]
        return SimpleNamespace(code=max(codes, key=abs), out=texts[0], err=texts[1], codes=codes, all="".join(texts))

    def stop(self):
        """Kill what still runs."""
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
                process.join()


def jobs_of(file, argv, folder, processes=1, others=(), before=None):
    """Arguments of `program` for each process; `others`: options that follow in all processes but the first."""
    shared = launched(processes)
    for rank in range(processes):
        env = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        words = [str(word) for word in (*argv, *(others if rank else ()))]
        yield words, folder / f"rank{rank}", env, file, before


@pytest.fixture(scope="session")
def start_program(tmp_path_factory):
    """Start a program: ``start_program(file, *argv, processes=1, others=(), before=None)``."""
    started = []

    def start(file, *argv, **how):
        started.append(Started(list(jobs_of(file, argv, tmp_path_factory.mktemp("outputs"), **how))))
        return started[-1]

    yield start
    for run in started:
        run.stop()


def write_log(folder, *lines):
    """A log.txt with these lines; returns the folder."""
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def log_of(folder):
    """The lines of a run's log.txt."""
    return [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]
