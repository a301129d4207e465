"""What a run of the fine-tuning program takes from a checkpoint, and which runs it refuses to go on with.

Runs are processes of a fork server (fixtures_finetuning.py).
"""

import argparse
import re
import shutil

import pytest
import torch
from fixtures_finetuning import CLASSES, CUSTOM, EPOCHS, SEEN, TINY, TRAIN, log_of, read, test_metrics_of

from options import check_start
from utils import RunError
from weights import fingerprint

pytest_plugins = "fixtures_finetuning"


def test_a_test_sees_videos_as_the_training_did(run, data, trained, tmp_path):
    """Model, classes, frames, stride, size come from the checkpoint; what is given wins and is told."""
    folder, quiet = tmp_path / "run", ["--data_path", data, *SEEN, "--eval", "--finetune", trained.best]
    found = run(*quiet, "--output_dir", folder)
    told = "--model vit_tiny_patch16_224, --num_frames 4, --sampling_rate 2, --input_size 32, --data_set custom"
    assert found.code == 0 and f"{trained.best} was trained: {told}, --nb_classes 3" in found.out, found.all
    assert test_metrics_of(log_of(folder)) == test_metrics_of(log_of(trained.folder))
    found = run(*quiet, "--num_frames", 16, "--sampling_rate", 2)
    told = [line for line in found.out.splitlines() if "was trained with" in line]
    assert found.code == 0 and len(told) == 1 and told[0].endswith("with --num_frames 4 (here 16)"), found.all


def test_predictions_and_neighbours_see_videos_as_the_training_did(run, data, trained, tmp_path):
    """With nothing given but the checkpoint; and both are right, as the videos are those of the training."""
    printed = {}
    for how, value in (("predict", data / "carphone_pristine 0.mp4"), ("knn", 1)):
        job = ["--data_path", data, f"--{how}", value, "--output_dir", tmp_path]
        given = [*CUSTOM, *TINY, *SEEN, "--finetune", trained.best, *job]
        first, second = run(*SEEN, "--finetune", trained.best, *job), run(*given)
        assert first.code == second.code == 0, first.all + second.all
        assert "--num_frames 4" in first.out and "was trained" not in second.out
        results = [re.findall(r"^[01]\.\d{4}  .*|acc1.*", found.out, re.MULTILINE) for found in (first, second)]
        assert results[0] and results[0] == results[1]
        printed[how] = results[0]
    scores, names = zip(*(row.split("  ", 1) for row in printed["predict"]))
    assert names[0] == "phoning" and set(names) == set(CLASSES)
    values = [float(score) for score in scores]
    assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1, abs=2e-4)
    for metrics in test_metrics_of(log_of(tmp_path)):
        assert (metrics["videos"], metrics["unreadable"]) == (7, 1) and metrics["acc1"] == pytest.approx(600 / 7)


def test_fine_tuning_tells_how_clips_differ_from_those_of_pretraining(run, custom, trained, tmp_path):
    """In a dry run, which writes nothing."""
    start = [*custom, *TRAIN, "--finetune", trained.best, "--dry_run", "--output_dir", tmp_path / "dry"]
    same, other = run(*start), run(*start, "--num_frames", 6, "--input_size", 48)
    assert same.code == other.code == 0 and "was trained" not in same.out, same.all + other.all
    assert "dry run" in same.out and not (tmp_path / "dry").exists()
    assert f"{trained.best} was trained with --num_frames 4 (here 6), --input_size 32 (here 48)" in other.out


def test_a_resume_tells_what_is_new_about_clips_and_optimizer(run, custom, trained, tmp_path):
    """At the end of the run it is refused: the test would be of a model with other options."""
    new = "--sampling_rate 3 --drop_path 0.2 --opt_betas 0.8 0.99 --layer_decay 0.9 --output_dir".split()
    new.append(tmp_path / "run")
    last = trained.folder / f"checkpoint-{EPOCHS - 1}.pth"
    found = run(*custom, *TRAIN, "--epochs", EPOCHS, "--resume", last, *new)
    text = f"error: {last} is of a finished run with --drop_path 0.0 (here 0.2)"
    assert found.code == 1 and text in found.err, found.all
    found = run(*custom, *TRAIN, "--epochs", EPOCHS + 1, "--resume", last, *new)
    assert found.code == 0 and f"resuming from {last}" in found.out, found.all
    told = f"--drop_path 0.0 (here 0.2), --epochs {EPOCHS} (here {EPOCHS + 1}), --layer_decay 1.0 (here 0.9), "
    told += "--opt_betas [0.9, 0.999] (here [0.8, 0.99]), "
    told += "--sampling_rate 2 (here 3)"
    assert f"{last} was trained with {told}\n" in found.out


def test_a_folder_with_a_run_from_other_weights_is_not_resumed(run, custom, trained, tmp_path):
    """Else the test would be of the first model. The same weights may have another path."""
    start, moved, other = (tmp_path / f"{name}.pth" for name in ("start", "moved", "other"))
    for path in (start, moved):
        shutil.copy(trained.best, path)
    shutil.copy(trained.folder / f"checkpoint-{EPOCHS - 1}.pth", other)
    options = [*custom, *TRAIN, "--epochs", 1, "--output_dir", tmp_path / "run"]
    assert (first := run(*options, "--finetune", start)).code == 0, first.all
    last = tmp_path / "run" / "checkpoint-0.pth"
    for again in (run(*options, "--finetune", moved), run(*options)):
        assert again.code == 0 and f"resuming from {last}" in again.out and "was trained with" not in again.out, (
            again.all
        )
    refused = run(*options, "--finetune", other)
    text = f"error: {last} is of a run that started from {start}, not from {other}: choose another --output_dir"
    assert refused.code == 1 and text in refused.err, refused.all


def test_a_run_from_another_encoder_is_another_one(tmp_path):
    """Weights are compared by their contents, or by their name."""
    for name in "abc":
        (tmp_path / name).write_bytes(b"first" if name < "c" else b"other")
    first = argparse.Namespace(encoder="ViT-B-16", encoder_weights=str(tmp_path / "a"))
    check_start(first, {}, "")
    for encoder, weights in (("ViT-B-16", "b"), ("ViT-B-16", "c"), ("ViT-L-14", "a"), ("ViT-B-16", "random")):
        path = str(tmp_path / weights) if weights < "d" else weights
        args = argparse.Namespace(encoder=encoder, encoder_weights=path)
        if (encoder, weights) == ("ViT-B-16", "b"):
            check_start(args, vars(first), "x.pth")
        else:
            with pytest.raises(RunError, match=f"x.pth is of .* from ViT-B-16 .*/a, not from {encoder} {path}: choose"):
                check_start(args, vars(first), "x.pth")


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """Its note of the weights was of the beginning of the file alone."""
    (tmp_path / "a").write_bytes(b"weights")
    args = argparse.Namespace(finetune=str(tmp_path / "a"))
    check_start(args, {"start_weights": "0123456789abcdef"}, "x.pth")
    assert args.start_weights == fingerprint(tmp_path / "a")
    with pytest.raises(RunError, match="x.pth is of a run that started from"):
        check_start(args, {"start_weights": "sha256:0123456789abcdef"}, "x.pth")


def test_a_fingerprint_is_of_every_byte(tmp_path):
    """Files that differ only after many megabytes, such as two heads on one encoder."""
    found = set()
    for name, last in (("a", 0), ("b", 1), ("c", 0)):
        with open(tmp_path / name, "wb") as file:
            file.truncate(20 << 20)
            file.seek((20 << 20) - 1)
            file.write(bytes([last]))
        found.add(fingerprint(tmp_path / name))
    assert len(found) == 2


def test_the_best_weights_are_of_the_run_that_is_tested(run, custom, tmp_path):
    """And not of epochs that were trained before the run went back to an earlier checkpoint."""
    options = [*custom, *TRAIN, "--epochs", 3, "--output_dir", tmp_path]
    assert (found := run(*options, "--save_ckpt_freq", 1)).code == 0, found.all
    best = read(tmp_path / "checkpoint-best.pth")["best"]
    back = ["--no_auto_resume", "--resume", tmp_path / "checkpoint-0.pth", "--lr", 0, "--min_lr", 0]
    assert (found := run(*options, *back)).code == 0, found.all
    kept, now = read(tmp_path / "checkpoint-0.pth")["model"], read(tmp_path / "checkpoint-best.pth")["model"]
    assert all(torch.equal(now[name], value) for name, value in kept.items())
    assert (tmp_path / "checkpoint-best.other.pth").exists() == (best["epoch"] > 0)
