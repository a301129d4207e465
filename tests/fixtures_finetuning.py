"""The fine-tuning program for the tests: ways to run it, data, and one model trained to the end in a session.

A pytest plugin (``pytest_plugins = "fixtures_finetuning"``). Most runs are processes of a fork server that has imported
torch already, which saves seconds each. No test here: PYTEST_DONT_REWRITE.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixtures_video import ROOT, fork_server, free_port, source_frames, write_mp4

from meters import RunLog

pytest_plugins = "fixtures_video"
NAME = "run_class_finetuning.py"
TINY = """--model vit_tiny_patch16_224 --input_size 32 --num_frames 4 --sampling_rate 2 --num_workers 0
    --log_interval 1""".split()
PLAIN = ["--aa", "", "--mixup", "0", "--cutmix", "0", "--reprob", "0", "--smoothing", "0", "--drop_path", "0"]
LEARN = """--batch_size 3 --num_sample 4 --lr 0.08 --layer_decay 1 --init_scale 1 --warmup_epochs 1
    --test_num_segment 2 --test_num_crop 3""".split()
TRAIN = [*TINY, *PLAIN, *LEARN]
CUSTOM = ["--data_set", "custom", "--nb_classes", "3"]
EPOCHS = 20
METRICS = ("acc1", "class_acc1", "acc5", "class_acc5", "videos", "views", "unreadable")


# Running the program --------------------------------------------------------------------------------------------


def program(argv, output, env, file=NAME, killed_at=None):
    """Be ``python run_class_finetuning.py ARGV``, or another program; `killed_at`: an epoch whose line is its last."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(env)
    torch.set_num_threads(1)
    log_epoch = RunLog.epoch

    def log_and_die(log, values):
        log_epoch(log, values)
        if values.get("epoch") == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if killed_at is not None:
        RunLog.epoch = log_and_die
    sys.argv = [file, *argv]
    runpy.run_path(str(ROOT / file), run_name="__main__")


@pytest.fixture(scope="session")
def server():
    """Context whose processes have imported what the program imports."""
    return fork_server()


@pytest.fixture
def run(server, tmp_path):
    """Run the program to its end, in one or more processes: code, and the first one's stdout and stderr.

    `others`: options that follow in all processes but the first.
    """

    def run(*argv, processes=1, start_only=False, file=NAME, killed_at=None, others=()):
        env = [{}]
        if processes > 1:
            shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
            env = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        outputs = [tmp_path / f"rank{rank}" for rank in range(processes)]
        argvs = [[str(a) for a in (*argv, *(others if rank else ()))] for rank in range(processes)]
        started = [
            server.Process(target=program, args=(words, output, e, file, killed_at))
            for words, output, e in zip(argvs, outputs, env)
        ]
        for process in started:
            process.start()
        if start_only:
            return started[0]
        for process in started:
            process.join(300)
            if process.exitcode is None:
                process.kill()
        texts = [output.with_suffix(suffix).read_text() for output in outputs for suffix in (".out", ".err")]
        codes = [process.exitcode for process in started]
        return SimpleNamespace(code=max(codes, key=abs), out=texts[0], err=texts[1], codes=codes, all="".join(texts))

    return run


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "log.txt").read_text().splitlines()]


def test_metrics_of(log):
    return [{name: line[f"test_{name}"] for name in METRICS} for line in log if "test_acc1" in line]


test_metrics_of.__test__ = False


# Data and a trained model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def data(broken, tmp_path_factory):
    """Two clips of each of three videos to train and validate on; the test list has an unreadable one besides.

    Each class has a colour of its own, so that any training separates them, whatever the rounding of a machine.
    """
    folder, lines = tmp_path_factory.mktemp("a data set"), []
    for label, source in enumerate(("bikes", "bigbuckbunny", "carphone_pristine")):
        for part in range(2):
            path = folder / f"{source} {part}.mp4"
            frames = source_frames(source, 40 * part, 24, (80, 64)) // 2
            frames[..., label] += 110
            write_mp4(path, frames)
            lines.append(f"{path} {label}\n")
    (folder / "train.csv").write_text("".join(lines))
    (folder / "val.csv").write_text("".join(lines))
    (folder / "test.csv").write_text("".join([*lines[:3], f"{broken['text']} 1\n", *lines[3:]]))
    (folder / "classes.txt").write_text("riding a bike\na rabbit\nphoning\n")
    return folder


@pytest.fixture(scope="session")
def custom(data):
    return [*CUSTOM, "--data_path", data]


@pytest.fixture(scope="session")
def trained(server, custom, tmp_path_factory):
    """A run to its end: folder, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    argv = [*custom, *TRAIN, "--epochs", EPOCHS, "--output_dir", folder / "run", "--save_ckpt_freq", "100"]
    process = server.Process(target=program, args=([str(a) for a in argv], folder / "text", {}))
    process.start()
    process.join(300)
    text = (folder / "text.out").read_text() + (folder / "text.err").read_text()
    assert process.exitcode == 0, text
    return SimpleNamespace(folder=folder / "run", text=text, best=folder / "run" / "checkpoint-best.pth")
