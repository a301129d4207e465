"""Pretraining teaches: after a short stage 1 in a small world, how an object moves can be learnt from few clips.

The real programs, with the demo teacher. A machine that rounds otherwise gets other weights, so no accuracy is
asserted, only a difference far outside of chance.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from fixtures_finetuning import ROOT, log_of
from fixtures_scripts import programs_served

sys.path.insert(0, str(ROOT / "scripts" / "mini"))
import make_world

DIRECTIONS = make_world.MOTIONS[:4]  # left, right, up, down
SIZES = (0.41, 0.69)  # of objects: larger than the default, so that little training is enough
TEST_CLIPS = 160
# Stage 1 of the quickstart, with one object, and half of its clips in a step.
PRETRAIN = """
demo_teacher "$WORLD/teacher.pth"
pretrain "$WORLD/stage1" 0 "$STEPS" "${TEACHER[@]}" "${OVERLAY[@]}" "${TRAJECTORY[@]}" --num_rois 1 \\
  --batch_size 16 --lr 1.6e-2 --min_lr 1.6e-4
"""
# The quickstart's fine-tuning on how the object moves, with half of the clips in a step, and its test.
FINETUNE = 'evaluate "$WORLD/{}" motion 0 --nb_classes 4 --batch_size 8 --lr 3.2e-2 {}'


def train(world, env, command):
    """Run a command that is made of the functions of scripts/mini/common.sh."""
    settings = {"OMP_NUM_THREADS": "1", "WORLD": str(world), "SIDE": "64", "WORKERS": "0"}
    settings |= {"STEPS": "240", "FINETUNE_EPOCHS": "4"}
    env = os.environ | env | settings
    words = ["bash", "-euo", "pipefail", "-c", f"source scripts/mini/common.sh\n{command}"]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A world of four motions of large objects, a stage 1 in it, and models fine-tuned from it and from scratch."""
    world = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_world, "MOTIONS", DIRECTIONS)
        patch.setattr(make_world, "SIZES", SIZES)
        clips = f"--pretrain_clips 240 --train_clips 600 --val_clips 8 --test_clips {TEST_CLIPS}"
        make_world.main([str(world), *clips.split(), "--tasks", "motion"])
    with programs_served(tmp_path_factory.mktemp("served")) as env, ThreadPoolExecutor(2) as pool:
        scratch = pool.submit(train, world, env, FINETUNE.format("scratch", ""))
        train(world, env, PRETRAIN)
        train(world, env, FINETUNE.format("pretrained", '--finetune "$WORLD"/stage1/checkpoint-*.pth'))
        scratch.result()
    return world


def test_stage_1_predicts_more_than_the_mean(runs):
    loss = log_of(runs / "stage1")[-1]["train_loss"]
    assert loss < 0.96, "targets are normalised: predicting their mean gives 1"


def test_fine_tuning_from_stage_1_beats_scratch(runs):
    """By more than three standard errors of a difference of two shares of the test clips, at most 3 * sqrt(.5 / n)."""
    pretrained, scratch = (log_of(runs / name)[-1]["test_acc1"] for name in ("pretrained", "scratch"))
    assert pretrained - scratch > 100 * 3 * (0.5 / TEST_CLIPS) ** 0.5, (pretrained, scratch)
