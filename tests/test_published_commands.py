"""Command lines as SMILE and VideoMAE publish them, whole but for the program's name and the paths: they are understood
as they are meant there, and run as a dry run on small data. And torch.distributed.launch, with which they start.
"""

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from fixtures_finetuning import TINY as FINETUNE_TINY
from fixtures_pretraining import NAME, TINY
from fixtures_video import ROOT, free_port, write_list

import run_class_finetuning
import run_smile_pretraining
from modeling_finetune import MODELS

pytest_plugins = ("fixtures_pretraining", "fixtures_finetuning")

# --data_path, --output_dir, --log_dir and other paths stand in these as DATA, OUT, OBJECTS, WEIGHTS.
VIDEOMAE = """--data_path DATA --mask_type tube --mask_ratio 0.9 --model pretrain_videomae_base_patch16_224
    --decoder_depth 4 --batch_size 32 --num_frames 16 --sampling_rate 4 --opt adamw --opt_betas 0.9 0.95
    --warmup_epochs 40 --save_ckpt_freq 20 --epochs 1601 --log_dir OUT --output_dir OUT"""
SMILE = """--data_path DATA --mask_ratio 0.8 --model pretrain_videomae_base_patch16_224 --decoder_depth 4
    --batch_size 32 --num_frames 16 --sampling_rate 4 --opt adamw --opt_betas 0.9 0.95 --warmup_epochs 40
    --save_ckpt_freq 20 --epochs 801 --log_dir OUT --output_dir OUT --target_type clip --distillation_teacher clip_b
    --multiple_sampling"""
PRETRAINING = {
    "SMILE K400 stage 1": SMILE
    + """ --mask_type tubelet --sub_mask_type tube+traj_mask --traj_unmask_ratio 0.2 --add_tubelets --use_objects
    --objects_path OBJECTS --motion_type gaussian""",
    "SMILE K400 stage 2": SMILE + " --mask_type tube --first_stage_path WEIGHTS",
    "VideoMAE K400": VIDEOMAE,
    "VideoMAE SSv2": VIDEOMAE.replace("--sampling_rate 4", "--sampling_rate 2").replace("1601", "2401"),
    "VideoMAE UCF101": VIDEOMAE.replace("--mask_ratio 0.9", "--mask_ratio 0.75 --lr 3e-4 --normlize_target True")
    .replace("--batch_size 32", "--batch_size 24")
    .replace("1601", "3201"),
}

COMMON = """--data_path DATA --finetune WEIGHTS --log_dir OUT --output_dir OUT --model vit_base_patch16_224
    --input_size 224 --short_side_size 224 --save_ckpt_freq 10 --num_frames 16 --opt adamw --opt_betas 0.9 0.999
    --weight_decay 0.05 --dist_eval --test_num_crop 3 --enable_deepspeed"""
FINETUNING = {
    "SMILE K400": COMMON
    + """ --data_set Kinetics-400 --nb_classes 400 --batch_size 4 --sampling_rate 4 --num_sample 1 --lr 1e-3
    --layer_decay 0.75 --drop_path 0.1 --epochs 100 --test_num_segment 7""",
    "SMILE SSv2": COMMON
    + """ --data_set SSV2 --nb_classes 174 --batch_size 8 --num_sample 1 --lr 1e-3 --layer_decay 0.7 --epochs 40
    --test_num_segment 2""",
    "VideoMAE K400": COMMON
    + """ --data_set Kinetics-400 --nb_classes 400 --batch_size 8 --sampling_rate 4 --lr 5e-4 --epochs 75
    --test_num_segment 5""",
    "VideoMAE SSv2": COMMON
    + """ --data_set SSV2 --nb_classes 174 --batch_size 8 --num_sample 2 --lr 5e-4 --epochs 50 --test_num_segment 2
    --tubelet_size 2 --use_mean_pooling""",
    "VideoMAE UCF101": COMMON
    + """ --data_set UCF101 --nb_classes 101 --batch_size 8 --sampling_rate 4 --num_sample 2 --lr 5e-4 --warmup_lr 1e-8
    --min_lr 1e-5 --layer_decay 0.7 --epochs 100 --test_num_segment 10 --fc_drop_rate 0.5 --drop_path 0.2
    --use_checkpoint""",
}
SMALL = ["--num_workers", "0", "--dry_run"]


def options_of(text, **paths):
    """The words of a command line, with paths in place of their names."""
    return [str(paths.get(word, word)) for word in text.split()]


def check_meaning(text, args):
    """Every option that takes a value here has the published one."""
    words, seen = text.split(), 0
    for word, value in pairwise(words):
        name = word.removeprefix("--")
        if word.startswith("--") and not value.startswith("--") and hasattr(args, name) and not value.isupper():
            held = getattr(args, name)
            assert str(held) == value or float(held if not isinstance(held, list) else held[0]) == float(value), word
            seen += 1
    assert seen > 10


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of a tiny encoder."""
    path = tmp_path_factory.mktemp("weights") / "encoder.pth"
    torch.save({"model": MODELS["vit_tiny_patch16_224"](num_classes=0).state_dict()}, path)
    return path


@pytest.mark.parametrize("text", PRETRAINING.values(), ids=PRETRAINING)
def test_pretraining(text, start, clips, objects_folder, tmp_path):
    check_meaning(text, run_smile_pretraining.get_args(text.split()))
    data = write_list(tmp_path / "list.csv", clips.values())
    options = options_of(
        text.replace("--first_stage_path WEIGHTS", ""), DATA=data, OUT=tmp_path, OBJECTS=objects_folder
    )
    result = start(*options, *TINY, *SMALL, "--batch_size", "4", "--target_type", "pixel").end()
    assert result.code == 0 and "steps went well" in result.out, result.err
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize("text", FINETUNING.values(), ids=FINETUNING)
def test_fine_tuning(text, run, clips, weights, tmp_path):
    args = run_class_finetuning.get_args(text.split())
    check_meaning(text, args)
    assert "--dist_eval" in args.not_needed and args.enable_deepspeed
    for name in ("train.csv", "val.csv", "test.csv"):
        write_list(tmp_path / name, list(clips.values()) * 2, 1)
    small = [*FINETUNE_TINY, "--short_side_size", "32", *SMALL, "--batch_size", "2"]
    if text != FINETUNING["VideoMAE UCF101"]:  # DeepSpeed takes seconds, so once
        text = text.replace("--enable_deepspeed", "")
    result = run(*options_of(text, DATA=tmp_path, OUT=tmp_path, WEIGHTS=weights), *small)
    assert result.code == 0 and "steps went well" in result.out, result.err


def test_torch_distributed_launch(clips, tmp_path):
    """The launcher of those scripts, which torch still has."""
    data = write_list(tmp_path / "list.csv", clips.values())
    launcher = ["-m", "torch.distributed.launch", "--use_env", "--nproc_per_node", "1", "--master_port", free_port()]
    options = [
        *options_of(VIDEOMAE, DATA=data, OUT=tmp_path),
        *TINY,
        *SMALL,
        *"--batch_size 4 --target_type pixel".split(),
    ]
    result = subprocess.run(
        [sys.executable, *launcher, NAME, *options], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0 and "steps went well" in result.stdout, result.stderr
