"""Pretraining teaches: after a short stage 1 in a small world, how an object moves can be learnt from few clips.

The real programs, with the demo teacher. A machine that rounds otherwise gets other weights, so no accuracy is
asserted, only differences far outside the spread over seeds.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
from fixtures_finetuning import ROOT, log_of
from fixtures_scripts import programs_served

sys.path.insert(0, str(ROOT / "scripts" / "mini"))
import make_world

DIRECTIONS = make_world.MOTIONS[:4]  # left, right, up, down
SIZES = (0.41, 0.69)  # of objects: larger than the default, so that little training is enough
SEEDS = (0, 1)
# Stage 1 of the quickstart, with one object, and half of its clips in a step.
PRETRAIN = """
demo_teacher "$WORLD/teacher.pth"
pretrain "$WORLD/stage1" 0 240 "${TEACHER[@]}" "${OVERLAY[@]}" "${TRAJECTORY[@]}" --num_rois 1 \\
  --batch_size 16 --lr 1.6e-2 --min_lr 1.6e-4
"""


def train(world, env, command):
    """Run a command that is made of the functions of scripts/mini/common.sh."""
    settings = {"OMP_NUM_THREADS": "1", "WORLD": str(world), "SIDE": "64", "WORKERS": "0", "FINETUNE_EPOCHS": "4"}
    env = os.environ | env | settings
    words = ["bash", "-euo", "pipefail", "-c", f"source scripts/mini/common.sh\n{command}"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def fine_tune(world, env, name, seed, flags=""):
    """The quickstart's fine-tuning on how the object moves, with half of the clips in a step, and its test."""
    options = f"--nb_classes {len(DIRECTIONS)} --batch_size 8 --lr 3.2e-2 {flags}"
    train(world, env, f'evaluate "$WORLD/{name}-{seed}" motion {seed} {options}')


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world of four motions of large objects."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_world, "MOTIONS", DIRECTIONS)
        patch.setattr(make_world, "SIZES", SIZES)
        clips = ["--pretrain_clips", "240", "--train_clips", "600", "--val_clips", "8", "--test_clips", "160"]
        make_world.main([str(folder), *clips, "--tasks", "motion"])
    return folder


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """The folder with a stage 1, and with fine-tuned models from it and from scratch."""
    with programs_served(tmp_path_factory.mktemp("served")) as env:
        train(world, env, PRETRAIN)
        start = {"scratch": "", "pretrained": '--finetune "$WORLD/stage1/checkpoint-3.pth"'}
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda run: fine_tune(world, env, *run, start[run[0]]), product(start, SEEDS)))
    return world


def test_stage_1_predicts_more_than_the_mean(runs):
    loss = log_of(runs / "stage1")[-1]["train_loss"]
    assert loss < 0.96, "targets are normalised: predicting their mean gives 1"


def test_fine_tuning_from_stage_1_beats_scratch(runs):
    """By more than the standard deviation over seeds."""
    pretrained, scratch = (
        [log_of(runs / f"{name}-{seed}")[-1]["test_acc1"] for seed in SEEDS] for name in ("pretrained", "scratch")
    )
    gain, spread = np.mean(pretrained) - np.mean(scratch), max(np.std(pretrained, ddof=1), np.std(scratch, ddof=1))
    assert gain > spread and min(pretrained) > max(scratch), (pretrained, scratch)
