"""The fine-tuning program for the tests: a way to run it, data, and one model trained to the end in a session.

A pytest plugin (``pytest_plugins = "fixtures_finetuning"``). No test here: PYTEST_DONT_REWRITE.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures_programs import log_of
from fixtures_video import ROOT, source_frames, write_mp4

__all__ = ["ROOT", "log_of"]
pytest_plugins = ("fixtures_video", "fixtures_programs")
NAME = "run_class_finetuning.py"
TINY = """--model vit_tiny_patch16_224 --input_size 32 --num_frames 4 --sampling_rate 2 --num_workers 0
    --log_interval 1 --max_bad_fraction 0.5""".split()
PLAIN = ["--aa", "", *"--mixup 0 --cutmix 0 --reprob 0 --smoothing 0 --drop_path 0".split()]
LEARN = """--batch_size 3 --num_sample 4 --lr 0.08 --layer_decay 1 --init_scale 1 --warmup_epochs 1
    --test_num_segment 2 --test_num_crop 3""".split()
TRAIN = [*TINY, *PLAIN, *LEARN]
CUSTOM = ["--data_set", "custom", "--nb_classes", "3"]
EPOCHS = 20
CLASSES = np.array(["riding a bike", "a rabbit", "phoning"])
SEEN = """--num_workers 0 --test_num_segment 2 --test_num_crop 3
    --max_bad_fraction 0.5""".split()  # what does not belong to the training
METRICS = ("acc1", "class_acc1", "acc5", "class_acc5", "videos", "views", "unreadable")


@pytest.fixture(scope="session")
def run(start_program):
    """Run the program, or `file`, to its end, in one or more processes: codes, and what they said."""
    return lambda *argv, file=NAME, **how: start_program(file, *argv, **how).end()


def read(path):
    return torch.load(path, map_location="cpu", weights_only=False)


def test_metrics_of(log):
    return [{name: line[f"test_{name}"] for name in METRICS} for line in log if "test_acc1" in line]


test_metrics_of.__test__ = False


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
def trained(run, custom, tmp_path_factory):
    """A run to its end: folder, its best checkpoint, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    found = run(*custom, *TRAIN, "--epochs", EPOCHS, "--output_dir", folder, "--save_ckpt_freq", "100")
    assert found.code == 0, found.all
    return SimpleNamespace(folder=folder, text=found.all, best=folder / "checkpoint-best.pth")
