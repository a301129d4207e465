"""What the pretraining program is given: wrong input, told in one line each, and the options of the recipe."""

import re

import numpy as np
import pytest
import torch
from fixtures_pretraining import TINY, TRAIN, last_weights
from fixtures_scripts import check_defaults
from fixtures_video import write_list

from datasets import ChunkSampler
from optim_factory import parameter_groups
from options import build_stepper
from run_smile_pretraining import build_dataset, clips_per_video, find_problems, get_args

pytest_plugins = ("fixtures_pretraining", "fixtures_data_tools")


def argv_of(data_args, *more):
    """Options of a run, later ones win."""
    return [str(word) for word in (*TINY, *TRAIN, *data_args, *more)]


WRONG = {  # options: what is said; {t}: the folder of wrong files
    "--data_path {t}/none.csv": "{t}/none.csv: no such list file",
    "--data_path {t}/empty.csv": "{t}/empty.csv: the list is empty",
    "--data_path {t}/label.csv": "{t}/label.csv, line 2: 'b.mp4' is not `path label`",
    "--objects_path {t}/none": "--objects_path {t}/none: no such folder",
    "--objects_path ": "--objects_path",
    "--objects_path {t}/empty": "{t}/empty: no object images",
    "--objects_list {t}/none.txt": "{t}/none.txt",
    "--mask_ratio 0": "--mask_ratio 0.0",
    "--mask_ratio 1": "--mask_ratio 1.0",
    "--input_size 50": "--input_size 50 is not divisible by the patch size 16",
    "--num_frames 5": "--num_frames 5 is not divisible by the tubelet size 2",
    "--first_stage_path {t}/label.csv": "{t}/label.csv",
    "--batch_size 5": "--batch_size 5 is not a multiple of the 2 clips",
    "--update_freq 0": "--update_freq 0: must be at least 1",
    "--sampling_rate 0": "--sampling_rate 0: must be at least 1",
    "--epochs 0": "--epochs 0: must be at least 1",
    "--target_type dino_v1": "--target_type dino_v1 needs --distillation_teacher dino_s or dino_b",
}
BY_NAME = """--mask_ratio 1.5, --mask_ratio -0.5, --mask_ratio nan, --mask_ratio 0.1, --first_stage_path {t}/none.pth,
    --resume {t}/none.pth, --batch_size 0, --seed -1, --num_workers -1, --decoder_depth -1,
    --traj_unmask_ratio 1.5, --scales 0, --output_dir {t}/label.csv"""
WRONG |= {option: option for option in " ".join(BY_NAME.split()).split(", ")}


@pytest.fixture
def wrong_files(tmp_path):
    (tmp_path / "empty.csv").write_text("\n")
    (tmp_path / "label.csv").write_text("a.mp4 0\nb.mp4\n")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize("options", WRONG)
def test_each_wrong_input_is_reported_by_its_name(options, data_args, wrong_files):
    words = [word.format(t=wrong_files) for word in options.split(" ")]
    [problem] = find_problems(get_args(argv_of(data_args, *words))).found
    assert WRONG[options].format(t=wrong_files) in problem and "\n" not in problem


def test_right_input_has_no_problems(data_args, objects_folder, tmp_path):
    (tmp_path / "objects.txt").write_text("disc/0.png\nbar/1.png\n")
    assert find_problems(get_args(argv_of(data_args))).found == []
    assert find_problems(get_args(argv_of(data_args, "--objects_list", tmp_path / "objects.txt"))).found == []
    assert find_problems(get_args(argv_of(data_args[:2], "--output_dir", tmp_path / "a" / "b"))).found == []
    [problem] = find_problems(get_args(argv_of(data_args[:2], "--mask_type", "tubelet"))).found
    assert problem == "--mask_type tubelet follows pasted objects: add --add_tubelets"


def test_all_problems_are_reported_at_once(start, wrong_files):
    wrong = "--mask_ratio 1.2 --add_tubelets --use_objects --first_stage_path x.pth".split()
    paths = {"--data_path": "label.csv", "--objects_path": "none", "--output_dir": "run"}
    result = start(*TINY, *wrong, *(word for flag, name in paths.items() for word in (flag, wrong_files / name))).end()
    lines = result.err.splitlines()
    assert result.code == 1 and lines[0].startswith("error: ") and len(lines) == 4
    for word in ("label.csv, line 2", "--mask_ratio 1.2", "--objects_path", "--first_stage_path x.pth"):
        assert sum(word in line for line in lines) == 1
    assert not (wrong_files / "run").exists()


def test_slow_videos_are_reported_once_at_the_start(start, odd_videos, tmp_path):
    path = write_list(tmp_path / "list.csv", [odd_videos[0]["one key.mp4"]] * 4)
    result = start(*TINY, *TRAIN, "--data_path", path, "--dry_run").end()
    assert result.code == 0 and result.out.count("4 of 4 checked videos are slow to load, for example") == 1, result.err


LATER = {  # options: a pattern; {ref}: a checkpoint
    "--model pretrain_videomae_small_patch16_224 --first_stage_path {ref}": "-1.pth does not fit this.*check --model",
    "--decoder_depth 2 --first_stage_path {ref}": "does not fit this model.*check --model",
    "--model pretrain_videomae_small_patch16_224 --resume {ref}": "checkpoint-1.pth is of another run",
    "--resume {t}/weights.pth": "weights.pth holds weights only",
    "--batch_size 80 --update_freq 2": "50 videos are fewer than the 80.*--batch_size",
    "--opt adamx": "--opt.*adamx|adamx.*--opt",
    "--target_type clip --clip_model ViT-X": "--clip_model ViT-X: not among",
    "--target_type clip --clip_weights none.pt": "--clip_weights none.pt: no such file",
}


@pytest.mark.parametrize(
    "options, target", [("--distillation_teacher dino_b", "dino_v1"), ("--teacher_weights x.pth", "timm")]
)
def test_a_teacher_that_is_named_is_not_silently_another_one(options, target, data_args):
    found = find_problems(get_args([*map(str, data_args), *options.split()])).found
    assert len([problem for problem in found if f"--target_type {target}" in problem]) == 1
    for other in (f"{options} --target_type pixel", "--teacher_norm clip --clip_weights random"):
        assert not find_problems(get_args([*map(str, data_args), *other.split()])).found


@pytest.mark.parametrize("options", LATER)
def test_what_is_found_while_building_is_one_line_too(options, start, data_args, reference, tmp_path):
    torch.save({"model": last_weights(reference.folder)}, tmp_path / "weights.pth")
    words = options.format(ref=reference.folder / "checkpoint-1.pth", t=tmp_path).split()
    result = start(*argv_of(data_args, *words)).end()
    assert result.code == 1 and re.fullmatch(rf"error: .*({LATER[options]}).*\n", result.err), result.err[-1000:]


@pytest.mark.parametrize(
    "more, total, steps",
    [
        ([], 8, 50 // 8),
        (["--multiple_sampling"], 8, 50 // 4),
        (["--update_freq", "3"], 24, 50 // 24),
        (["--multiple_sampling", "--update_freq", "2", "--num_sample", "2"], 16, 50 // 4),
        (["--warmup_steps", "9"], 8, 6),
    ],
)
def test_rates_follow_the_released_recipe_in_real_steps(data_args, more, total, steps):
    """lr x total batch / 256, linear warm-up from 0, cosine; per optimizer step that is made."""
    schedule = "--batch_size 8 --epochs 7 --warmup_epochs 2 --weight_decay_end 0.2".split()
    args = get_args([*map(str, data_args), *TINY, *schedule, *more])
    chunk = args.batch_size // clips_per_video(args)
    assert ChunkSampler(len(build_dataset(args)), chunk, args.update_freq).steps_per_epoch == steps
    model = torch.nn.Linear(2, 2)
    stepper = build_stepper(args, model, parameter_groups(model, 0.05), torch.device("cpu"), steps)
    warmup = 9 if "--warmup_steps" in more else 2 * steps
    base, final = 1.5e-4 * total / 256, 1e-5 * total / 256
    i = np.arange(7 * steps - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / len(i)))
    rates = np.concatenate([np.linspace(0, base, warmup), cosine])
    decays = 0.2 + 0.5 * (0.05 - 0.2) * (1 + np.cos(np.pi * np.arange(7 * steps) / (7 * steps)))
    shown = [stepper.schedule(step) for step in range(7 * steps)]
    np.testing.assert_allclose([row["lr"] for row in shown], rates, rtol=1e-9, atol=1e-18)
    np.testing.assert_allclose([row["weight_decay"] for row in shown], decays, rtol=1e-9)


def test_defaults_are_the_recipe_of_the_paper():
    recipe = """opt adamw opt_betas [0.9,0.95] opt_eps 1e-8 weight_decay 0.05 lr 1.5e-4 min_lr 1e-5 warmup_epochs 40
        warmup_lr 0 epochs 801 batch_size 32 mask_ratio 0.8 decoder_depth 4 num_frames 16 sampling_rate 4
        input_size 224 traj_unmask_ratio 0.1 clip_grad None motion_type gaussian scales [32,48,56,64,96,128]
        num_rois 2 sub_mask_type tube+traj_mask teacher_norm imagenet clip_model ViT-B-16 clip_weights openai""".split()
    check_defaults(get_args(["--data_path", "x"]), recipe)


FLAGS = """data_path mask_type sub_mask_type target_type distillation_teacher mask_ratio traj_unmask_ratio model
    decoder_depth batch_size num_frames sampling_rate opt opt_betas warmup_epochs save_ckpt_freq epochs
    add_tubelets use_objects motion_type scales log_dir output_dir objects_path multiple_sampling first_stage_path
    input_size drop_path opt_eps clip_grad weight_decay weight_decay_end lr warmup_lr min_lr warmup_steps
    use_checkpoint seed resume auto_resume no_auto_resume start_epoch num_workers pin_mem device""".split()


def test_help_knows_every_flag_of_the_released_script_in_groups(capsys):
    with pytest.raises(SystemExit) as exit_:
        get_args(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0 and all(re.search(rf"--{flag}\b", text) for flag in FLAGS)
    for group in ("data", "overlay", "mask", "model", "teacher", "optimizer", "run"):
        assert re.search(rf"^{group}\b.*:$", text, re.MULTILINE), group
