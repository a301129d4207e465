"""Commands that shell scripts and documents start, caught by stubs in place of the programs.

A pytest plugin (``pytest_plugins = "fixtures_scripts"``). No test here: PYTEST_DONT_REWRITE.
"""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from fixtures_programs import Started, jobs_of
from fixtures_video import ROOT

import run_class_finetuning
import run_smile_pretraining

SCRIPTS = ROOT / "scripts"
PRETRAIN, FINETUNE, TEST = (sorted((SCRIPTS / folder).glob("*.sh")) for folder in ("pretrain", "finetune", "test"))
SEVERE = sorted(path for path in (SCRIPTS / "severe").glob("*.sh") if path.stem != "run_all")
RECIPES = (*PRETRAIN, *FINETUNE, *TEST, *SEVERE)
PROGRAMS = {module.__name__ + ".py": module for module in (run_smile_pretraining, run_class_finetuning)}
STUB = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" $'\\n' >> "$STUB_LOG"
[[ $(basename "$0") == scontrol ]] || exit "${STUB_EXIT:-0}"
"""


def write_stubs(folder, *names, text=STUB):
    """A folder of programs that only write down how they were called, or of other ones."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def caught(log):
    """The commands that stubs wrote down, as lists of words."""
    return [line.split("\0")[:-1] for line in log.read_text().split("\n\0") if line]


def program_of(words):
    """The Python file that a command starts, and the options that follow it; (None, words) if it starts none."""
    for place, word in enumerate(words):
        if word.endswith(".py") and "=" not in word:
            return Path(word), words[place + 1 :]
    return None, words


def program_args(command):
    """What the program of a caught command makes of its options."""
    program, options = program_of(command)
    return PROGRAMS[program.name].get_args(options)


def launcher_option(command, name):
    return command[command.index(name) + 1]


# It asks the test to run the program, in processes that have imported torch already, and waits for the answer.
SERVED = f"""#!/usr/bin/env bash
[[ $* == *run_*.py* ]] || exec {sys.executable} "$@"
request=$(mktemp -d "$REQUESTS/XXXXXX")
printf '%s\\0' "$@" > "$request/arguments"
touch "$request/ready"
while [[ ! -e $request/code ]]; do sleep 0.02; done
cat "$request/rank0.out"
cat "$request"/*.err >&2
exit "$(<"$request/code")"
"""


def answer(request):
    """Run the command of a request in as many processes as it asks for."""
    words, code = (request / "arguments").read_text().split("\0")[:-1], 1
    try:
        program, options = program_of(words)
        processes = int(launcher_option(words, "--nproc_per_node")) if "--nproc_per_node" in words else 1
        code = Started(list(jobs_of(program.name, options, request, processes))).end(900).code
    finally:  # else the script would wait for ever
        (request / "draft").write_text(str(abs(code)))
        (request / "draft").rename(request / "code")


@contextmanager
def programs_served(folder):
    """Variables with which scripts start their programs, by python or torchrun, in processes of the fork server."""
    requests, stop, answers = folder / "requests", threading.Event(), []
    requests.mkdir()
    write_stubs(folder / "served", "python", "torchrun", text=SERVED)

    def serve():
        with ThreadPoolExecutor() as pool:  # a script may start programs side by side
            while not stop.is_set():
                for ready in requests.glob("*/ready"):
                    ready.unlink()
                    answers.append(pool.submit(answer, ready.parent))
                time.sleep(0.01)

    thread = threading.Thread(target=serve)
    thread.start()
    path = f"{folder / 'served'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    yield {"PATH": path, "REQUESTS": str(requests)}
    stop.set()
    thread.join()
    for answered in answers:
        answered.result()


def check_defaults(args, recipe):
    """`recipe`: name and value in turn, as words."""
    for name, value in zip(recipe[::2], recipe[1::2], strict=True):
        held = getattr(args, name)
        assert str(held).replace(" ", "") == value or held == float(value), (name, held)


@pytest.fixture
def run_script(tmp_path):
    """A function that runs a script with stubs and variables; gives the result and the commands it started."""
    stubs, log = write_stubs(tmp_path / "bin", "torchrun", "srun", "scontrol"), tmp_path / "commands"
    for name in ("my train.csv", "stage1.pth", "my model.pth"):
        (tmp_path / name).touch()
    (tmp_path / "objects").mkdir()
    env = {
        "PATH": f"{stubs}:{os.environ['PATH']}",
        "STUB_LOG": str(log),
        "DATA_PATH": str(tmp_path / "my train.csv"),
        "OBJECTS_PATH": str(tmp_path / "objects"),
        "FIRST_STAGE_CKPT": str(tmp_path / "stage1.pth"),
        "MODEL_PATH": str(tmp_path / "my model.pth"),
    }

    def call(script, *options, **variables):
        log.write_text("")
        words = ["bash", str(script), *options]
        result = subprocess.run(words, env=env | variables, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        return result, caught(log)

    return call
