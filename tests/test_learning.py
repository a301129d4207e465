"""Pretraining teaches: after a short stage 1 in a small world, how an object moves can be learnt from few clips.

The real programs, with the demo teacher. A machine that rounds otherwise gets other weights, so no accuracy is
asserted, only differences far outside the spread over seeds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "mini"))
import make_world

ROOT = Path(__file__).resolve().parents[1]
DIRECTIONS = make_world.MOTIONS[:4]  # left, right, up, down
SIZES = (26.0, 44.0)  # of objects, pixels of 64: larger than the default, so that little training is enough
EPOCHS, WARMUP_STEPS = 4, 60  # of stage 1, 120 steps an epoch
SEEDS = (0, 1)
CLIPS = ["--input_size", "64", "--num_frames", "8", "--num_workers", "0", "--save_ckpt_minutes", "0"]


def start(program, *argv):
    command = [sys.executable, str(ROOT / program), *map(str, argv)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world of four motions of large objects, with the demo teacher."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_world, "MOTIONS", DIRECTIONS)
        patch.setattr(make_world, "SIZES", SIZES)
        clips = ["--pretrain_clips", "240", "--train_clips", "600", "--val_clips", "8", "--test_clips", "160"]
        make_world.main([str(folder), *clips, "--tasks", "motion"])
    finish(start("scripts/mini/demo_teacher.py", folder / "teacher.pth"))
    return folder


def pretrain(world):
    """Start a stage 1: one object, a mask that follows it, the teacher's features."""
    data = ["--data_path", world / "pretrain" / "train.csv", *CLIPS, "--sampling_rate", 2]
    overlay = ["--add_tubelets", "--use_objects", "--objects_path", world / "objects", "--num_rois", 1]
    mask = ["--mask_type", "tubelet", "--sub_mask_type", "tube+traj_mask", "--mask_ratio", 0.9]
    teacher = ["--target_type", "timm", "--teacher_model", "tf_efficientnet_lite0", "--teacher_stage", -2]
    teacher += ["--teacher_weights", world / "teacher.pth", "--teacher_size", 64, "--teacher_norm", "own"]
    model = ["--model", "pretrain_videomae_tiny_patch16_224", "--decoder_depth", 2]
    optim = ["--lr", 1.6e-2, "--min_lr", 1.6e-4, "--warmup_steps", WARMUP_STEPS, "--batch_size", 16]
    optim += ["--multiple_sampling", "--num_sample", 4, "--epochs", EPOCHS]
    run = ["--log_interval", WARMUP_STEPS, "--save_ckpt_freq", EPOCHS, "--output_dir", world / "stage1"]
    return start("run_smile_pretraining.py", *data, *overlay, *mask, *teacher, *model, *optim, *run)


def fine_tune(world, name, seed, *flags):
    """Start fine-tuning on how the object moves, and the test."""
    data = ["--data_set", "custom-unmirrored", "--nb_classes", len(DIRECTIONS), "--data_path", world / "motion"]
    plain = ["--aa", "", "--mixup", 0, "--cutmix", 0, "--reprob", 0, "--drop_path", 0, "--init_scale", 1]
    optim = ["--batch_size", 8, "--lr", 3.2e-2, "--warmup_epochs", 1, "--epochs", 4, "--crop_area", 0.7]
    test = ["--disable_eval_during_finetuning", "--test_num_segment", 1, "--test_num_crop", 1]
    model = ["--model", "vit_tiny_patch16_224", "--sampling_rate", 1, "--seed", seed]
    out = ["--output_dir", world / f"{name}-{seed}", *flags]
    return start("run_class_finetuning.py", *data, *CLIPS, *model, *plain, *optim, *test, *out)


@pytest.fixture(scope="module")
def runs(world):
    """The folder with a stage 1, and with fine-tuned models from it and from scratch."""
    begun = [pretrain(world), *(fine_tune(world, "scratch", seed) for seed in SEEDS)]
    for process in begun:
        finish(process)
    weights = world / "stage1" / f"checkpoint-{EPOCHS - 1}.pth"
    for process in [fine_tune(world, "pretrained", seed, "--finetune", weights) for seed in SEEDS]:
        finish(process)
    return world


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_stage_1_predicts_more_than_the_mean(runs):
    loss = read_log(runs / "stage1")[-1]["train_loss"]
    assert loss < 0.96, "targets are normalised: predicting their mean gives 1"


def test_fine_tuning_from_stage_1_beats_scratch(runs):
    """By more than the standard deviation over seeds."""
    pretrained, scratch = (
        [read_log(runs / f"{name}-{seed}")[-1]["test_acc1"] for seed in SEEDS] for name in ("pretrained", "scratch")
    )
    gain, spread = np.mean(pretrained) - np.mean(scratch), max(np.std(pretrained, ddof=1), np.std(scratch, ddof=1))
    assert gain > spread and min(pretrained) > max(scratch), (pretrained, scratch)
