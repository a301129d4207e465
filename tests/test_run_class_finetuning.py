"""The fine-tuning program as it is used: training, resuming, testing and probing.

Runs are processes of a fork server (fixtures_finetuning.py).
"""

import csv
import functools
import itertools
import multiprocessing.connection
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_finetuning import CLASSES, CUSTOM, EPOCHS, NAME, PLAIN, SEEN, TINY, TRAIN, log_of, read, test_metrics_of

import evaluation
from datasets_finetune import few_shot
from evaluation import Evaluator
from meters import RunLog
from modeling_finetune import MODELS
from options_finetune import get_args, read_data_list
from utils import EXIT_REQUEUE

pytest_plugins = "fixtures_finetuning"


def same_curves(one, other, but=(), **tolerance):
    """Logs of two runs, apart from what the clock says."""
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds", *but}:
            assert a[name] == (pytest.approx(b[name], **tolerance) if tolerance else b[name]), (a["epoch"], name)


# Training -------------------------------------------------------------------------------------------------------


def test_it_overfits_a_tiny_set(trained, broken):
    log = log_of(trained.folder)
    assert [line.get("epoch") for line in log] == [*range(EPOCHS), None]
    assert log[0]["train_loss"] > 0.8 and np.mean([line["train_loss"] for line in log[-6:-1]]) < 0.4
    assert log[EPOCHS - 1]["val_acc1"] > 80 and all(line["steps"] == 2 for line in log[:EPOCHS])
    [metrics] = test_metrics_of(log)
    assert (metrics["videos"], metrics["views"], metrics["unreadable"]) == (7, 36, 1)
    assert metrics["acc1"] > 70 and metrics["acc5"] == pytest.approx(600 / 7)
    assert f"counted as wrong, {broken['text']} could not be read" in trained.text and "Traceback" not in trained.text
    with np.load(trained.folder / "test_predictions.npz") as file:
        assert file["video"][3] == str(broken["text"]) and np.isnan(file["scores"][3]).all()
    assert (trained.folder / "test_per_class.csv").read_text().splitlines()[2].startswith("1,a rabbit,3,")


def kill_after(last):
    """Have the program die when it has logged an epoch."""
    log_epoch = RunLog.epoch

    def log_and_die(log, values):
        log_epoch(log, values)
        if values.get("epoch") == last:
            os.kill(os.getpid(), signal.SIGKILL)

    RunLog.epoch = log_and_die


def test_a_killed_run_goes_on_where_it_was(run, custom, trained, tmp_path):
    """The curve is that of the undisturbed run, and the best epoch so far is remembered."""
    best, folder = read(trained.best), tmp_path / "killed"
    options = ["--epochs", EPOCHS, "--output_dir", folder, "--save_ckpt_freq", "100", "--save_ckpt_steps", "1"]
    last = best["best"]["epoch"] + 1
    assert run(*custom, *TRAIN, *options, before=functools.partial(kill_after, last)).code == -signal.SIGKILL
    assert [line["epoch"] for line in log_of(folder)] == list(range(last + 1))
    assert not list(folder.glob("checkpoint-1*.pth"))
    assert read(folder / "checkpoint-latest.pth")["epoch"] > best["best"]["epoch"]  # so the best is not found anew
    again = run(*custom, *TRAIN, *options)
    assert again.code == 0 and "resuming from" in again.out, again.all
    same_curves(log_of(folder), log_of(trained.folder))
    ours = read(folder / "checkpoint-best.pth")
    assert ours["best"] == best["best"] and ours["epoch"] == best["epoch"] == best["best"]["epoch"]
    assert all(torch.equal(ours["model"][name], value) for name, value in best["model"].items())
    last, theirs = (read(where / f"checkpoint-{EPOCHS - 1}.pth") for where in (folder, trained.folder))
    assert all(torch.equal(last["model"][name], value) for name, value in theirs["model"].items())
    assert last["best"] == best["best"]


def test_two_processes_train_as_one_that_accumulates(run, custom, tmp_path):
    """With all augmentation: RandAugment, erasing, Mixup, drop path. And both test the best weights."""
    options = """--batch_size 2 --lr 0.2 --epochs 2 --warmup_epochs 1 --test_num_segment 1 --num_sample 2
        --init_scale 1 --reprob 0.9""".split()
    options = [*custom, *TINY, *options]
    one = run(*options, "--update_freq", "2", "--output_dir", tmp_path / "one")
    two = run(*options, "--output_dir", tmp_path / "two", processes=2)
    assert one.code == 0 and two.codes == [0, 0], one.all + two.all
    logs = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    same_curves(*logs, but=["train_acc1"], rel=1e-3, abs=1e-4)
    assert all("total batch 4 videos (2 clips of each), 1 steps per epoch" in found.out for found in (one, two))
    weights = [read(tmp_path / name / "checkpoint-1.pth")["model"] for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-4, rtol=1e-2, msg=name)
    same_curves(*logs, rel=1e-3, abs=1e-4)  # train_acc1 too is of all clips of a step


def test_all_processes_test_the_best_weights_that_the_first_one_wrote(run, custom, tmp_path):
    """A large file, written just before."""
    folder, small = tmp_path / "run", ["--model", "vit_small_patch16_224", "--num_sample", "1"]
    found = run(*custom, *TRAIN, *small, "--epochs", "1", "--output_dir", folder, processes=2)
    assert found.codes == [0, 0] and len(test_metrics_of(log_of(folder))) == 1, found.all


def test_an_average_of_the_weights_is_validated_and_tested(run, custom, trained, tmp_path):
    folder = tmp_path / "ema"
    average = "--model_ema --model_ema_decay 0.5 --lr 1e-3 --epochs 2".split()
    options = [*custom, *TRAIN, *average, "--finetune", trained.best, "--output_dir", folder]
    assert (found := run(*options)).code == 0, found.all
    best = read(folder / "checkpoint-best.pth")
    assert best["model"].keys() == best["model_ema"].keys()
    assert any(not torch.equal(best["model"][name], value) for name, value in best["model_ema"].items())
    again = run(*custom, *TRAIN, "--eval", "--finetune", folder / "checkpoint-best.pth", "--output_dir", folder)
    metrics = test_metrics_of(log_of(folder))
    assert again.code == 0 and len(metrics) == 2 and metrics[0] == metrics[1]


def kill_workers_at_view(number):
    """Have all loader workers die while the program computes a view."""
    normalize, views = evaluation.normalize_clips, itertools.count(1)

    def kill_and_normalize(*args):
        if next(views) == number:
            workers = multiprocessing.active_children()
            for worker in workers:
                worker.kill()
            for worker in workers:
                multiprocessing.connection.wait([worker.sentinel])  # until it has ended
        return normalize(*args)

    evaluation.normalize_clips = kill_and_normalize


def test_workers_that_are_killed_end_a_test_with_one_line(run, data, trained, tmp_path):
    """For example by the kernel, out of memory; torch reports it from a signal handler, wherever the program is."""
    (tmp_path / "test.csv").write_text(10 * (data / "train.csv").read_text())
    argv = [*TINY, *CUSTOM, "--data_path", tmp_path, "--eval", "--finetune", trained.best, "--num_workers", 2]
    found = run(*argv, before=functools.partial(kill_workers_at_view, 3))
    lines = [line for line in found.err.splitlines() if line.startswith("error: the data loader failed (DataLoader")]
    assert found.code == 1 and len(lines) == 1 and "Traceback" not in found.err, found.err[-1000:]


def test_a_warm_up_as_long_as_the_run_is_reported(run, custom):
    long, short = (run(*custom, *TRAIN, "--epochs", 2, "--warmup_epochs", n, "--dry_run") for n in (2, 1))
    text = "the warm-up (4 steps) is not shorter than the schedule (4 steps): lower --warmup_epochs"
    assert long.code == short.code == 0 and text in long.out and "the warm-up" not in short.out, long.all


def note_buffers(folder):
    """Have the program write down the buffers that it validates with."""
    validate = Evaluator.validate

    def noting(evaluator, model, videos):
        torch.save(dict(model.named_buffers()), folder / os.environ["RANK"])
        return validate(evaluator, model, videos)

    Evaluator.validate = noting


def test_processes_validate_an_average_with_the_same_buffers(run, custom, trained, tmp_path):
    """A probe's batch norm has statistics of each process's own clips, and so has their average."""
    probe = "--linear_probe --model_ema --model_ema_decay 0.5 --epochs 1 --num_sample 1 --batch_size 2".split()
    noting = functools.partial(note_buffers, tmp_path)
    found = run(*custom, *TINY, *probe, "--finetune", trained.best, processes=2, before=noting)
    assert found.codes == [0, 0], found.all
    one, two = read(tmp_path / "0"), read(tmp_path / "1")
    assert len(one) > 4 and all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("stop_epoch, validated", [(3, [False, True, True]), (1, [True])])
def test_the_last_epoch_is_always_validated(run, custom, tmp_path, stop_epoch, validated):
    """Also that of a run shorter than --val_freq."""
    options = ["--epochs", "9", "--stop_epoch", stop_epoch, "--val_freq", "2", "--output_dir", tmp_path]
    found = run(*custom, *TRAIN, *options)
    log = log_of(tmp_path)
    assert found.code == 0 and ["val_acc1" in line for line in log] == [*validated, False], found.all
    assert len(test_metrics_of(log)) == 1


def test_without_an_output_folder_it_trains_and_tests_all_the_same(run, custom, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = run(*custom, *TRAIN, "--epochs", "1")
    assert found.code == 0 and "test: acc1" in found.out and not list(tmp_path.iterdir()), found.all


def test_few_shot_lists_are_drawn_by_the_seed_and_kept(run, custom, data, tmp_path):
    found = run(*custom, *TRAIN, *"--samples_per_class 1 --epochs 1 --seed 4 --output_dir".split(), tmp_path)
    assert found.code == 0 and "total batch 3 videos (4 clips of each), 1 steps" in found.out, found.all
    videos = read_data_list(get_args([*CUSTOM, "--data_path", str(data)]), "train.csv")
    few_shot(videos, 4, samples_per_class=1).write(str(tmp_path / "again.csv"))
    lines = (tmp_path / "train_subset.csv").read_text()
    assert lines == (tmp_path / "again.csv").read_text()
    assert sorted(line.split()[-1] for line in lines.splitlines()) == ["0", "1", "2"]


def test_an_early_stop_stays_one(run, custom, tmp_path):
    """The same command, started again, only tests again; also if the best weights are gone."""
    argv = [*custom, *TRAIN, "--lr", "1e-12", "--epochs", "50", "--patience", "2", "--output_dir", tmp_path / "run"]
    for time_around in range(3):
        found = run(*argv)
        log = log_of(tmp_path / "run")
        assert found.code == 0 and [line["epoch"] for line in log if "epoch" in line] == [0, 1, 2], found.all
        assert len(test_metrics_of(log)) == time_around + 1
        assert ("testing the last weights" in found.all) == (time_around == 2)
        if time_around == 1:
            (tmp_path / "run" / "checkpoint-best.pth").unlink()


def test_a_signal_ends_a_validation_which_is_made_later(start_program, run, custom, data, tmp_path):
    (tmp_path / "lists").mkdir()
    lines = (data / "val.csv").read_text()
    for name, times in (("train", 1), ("val", 300), ("test", 1)):
        (tmp_path / "lists" / f"{name}.csv").write_text(lines * times)
    argv = [*custom, *TRAIN, "--data_path", tmp_path / "lists", "--epochs", "1", "--output_dir", tmp_path / "run"]
    process = start_program(NAME, *argv)
    process.wait_for("validation begins")
    os.kill(process.pid, signal.SIGTERM)
    assert process.end().code == EXIT_REQUEUE and not (tmp_path / "run" / "log.txt").exists()
    for name in ("val", "test"):
        (tmp_path / "lists" / f"{name}.csv").write_text(lines)
    found = run(*argv)
    [epoch, test] = log_of(tmp_path / "run")
    assert found.code == 0 and "at epoch 0, step 2" in found.all, found.all
    assert epoch["epoch"] == 0 and epoch["train_loss"] > 0 and epoch["lr"] > 0 and "test_acc1" in test


# Testing --------------------------------------------------------------------------------------------------------


def test_processes_that_do_not_divide_the_list_find_the_same(run, custom, trained, tmp_path):
    """7 videos by 1, 3 and 2 processes: the same metrics and scores to the last digit."""
    metrics, scores = [], []
    for processes in (1, 3, 2):
        folder = tmp_path / str(processes)
        argv = [*custom, *TRAIN, "--eval", "--finetune", trained.best, "--output_dir", folder]
        assert (found := run(*argv, processes=processes)).code == 0, found.all
        metrics += test_metrics_of(log_of(folder))
        with np.load(folder / "test_predictions.npz") as file:
            scores.append({name: file[name] for name in file})
    assert len(metrics) == 3 and metrics[0] == metrics[1] == metrics[2] and metrics[0]["videos"] == 7
    for other in scores[1:]:
        for name, value in scores[0].items():
            np.testing.assert_array_equal(value, other[name])


def test_the_protocols_of_k400_and_ssv2(run, data, tmp_path):
    for data_set, classes, views in (("Kinetics-400", 400, 21), ("SSV2", 174, 6)):
        folder = tmp_path / data_set
        folder.mkdir()
        torch.save({"model": MODELS["vit_tiny_patch16_224"](num_classes=classes).state_dict()}, folder / "model.pth")
        (folder / "test.csv").write_text((data / "test.csv").read_text())
        given = ["--data_path", folder, "--finetune", folder / "model.pth", "--output_dir", folder]
        found = run("--data_set", data_set, *TINY, "--eval", *given)
        assert found.code == 0, found.all
        with np.load(folder / "test_predictions.npz") as file:
            assert file["view_scores"].shape == (7, views, classes)
        assert test_metrics_of(log_of(folder))[0]["views"] == 6 * views


def test_another_input_than_the_checkpoints(run, custom, trained, tmp_path):
    other = "--input_size 48 --num_frames 8 --eval".split()
    found = run(*custom, *TRAIN, *other, "--finetune", trained.best, "--output_dir", tmp_path)
    assert found.code == 0 and test_metrics_of(log_of(tmp_path))[0]["acc1"] > 40, found.all


def test_predictions_of_files_folders_and_lists(run, custom, trained, data, broken, tmp_path):
    """The scores are those of the test; so are those of a test list without labels."""
    (tmp_path / "films" / "deep").mkdir(parents=True)
    shutil.copy(data / "bikes 0.mp4", tmp_path / "films" / "deep" / "-12:30.MP4")
    listed = [data / "bigbuckbunny 1.mp4", broken["text"]]
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbf" + "".join(f"{path} what?\r\n" for path in listed).encode())
    inputs = [data / "carphone_pristine 0.mp4", tmp_path / "films", tmp_path / "list.csv"]
    argv = [*custom, *TRAIN, "--finetune", trained.best, "--output_dir"]
    found = run(*argv, tmp_path / "out", "--predict", *inputs, processes=2)
    assert found.code == 0 and f"no prediction, {broken['text']} could not be read" in found.all, found.all
    wanted = [data / "carphone_pristine 0.mp4", tmp_path / "films" / "deep" / "-12:30.MP4", *listed]
    with (
        np.load(tmp_path / "out" / "predictions.npz") as ours,
        np.load(trained.folder / "test_predictions.npz") as test,
    ):
        assert ours["video"].tolist() == list(map(str, wanted)) and ours["classes"][1] == "a rabbit"
        scores, known = ours["scores"], dict(zip(test["video"], test["scores"]))
    theirs = [known[str(path)] for path in (wanted[0], data / "bikes 0.mp4", *listed)]
    np.testing.assert_allclose(scores, theirs, rtol=1e-4, atol=1e-6)
    head, *rows = csv.reader((tmp_path / "out" / "predictions.csv").read_text().splitlines())
    assert head == ["path", *(f"{name}{place}" for place in (1, 2, 3) for name in ("class", "score"))]
    assert [row[:2] for row in rows[:3]] == [[str(path), name] for path, name in zip(wanted, CLASSES[[2, 0, 1]])]
    assert rows[3] == [str(broken["text"])] and float(rows[0][2]) == pytest.approx(scores[0].max(), abs=1e-4)
    (tmp_path / "test.csv").write_text("".join(f"{path} -1\n" for path in wanted))
    found = run(*argv, tmp_path / "eval", "--eval", "--data_path", tmp_path)
    assert found.code == 0 and "has no labels (-1): writing predictions, no accuracy" in found.all, found.all
    with np.load(tmp_path / "eval" / "predictions.npz") as ours:
        np.testing.assert_allclose(ours["scores"], scores, rtol=1e-4, atol=1e-6)
    (tmp_path / "test.csv").write_text(f"{wanted[0]} 2\n{wanted[1]} -1\n")
    found = run(*argv, tmp_path / "eval", "--eval", "--data_path", tmp_path)
    assert found.code == 1 and "test.csv, line 2: label -1 (none)" in found.err and "--predict" in found.err, found.all


def test_a_test_of_too_many_unreadable_videos_fails_after_it_is_written(run, custom, trained, tmp_path):
    options = ["--eval", "--finetune", trained.best, "--output_dir", tmp_path, "--max_bad_fraction", 0.1]
    found = run(*custom, *TRAIN, *options)
    assert found.code == 1 and "error: 1 of 7 videos could not be read, more than --max_bad_fraction 0.1" in found.err
    assert test_metrics_of(log_of(tmp_path))[0]["unreadable"] == 1 and (tmp_path / "test_predictions.npz").is_file()


def test_a_name_of_any_bytes(run, custom, trained, data, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.mp4"
    try:
        shutil.copy(data / "bikes 0.mp4", name)
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    options = [*custom, *TRAIN, "--finetune", trained.best, "--output_dir", tmp_path / "out"]
    found = run(*options, "--predict", os.fsdecode(name))
    assert found.code == 0 and (tmp_path / "out" / "predictions.npz").is_file(), found.all
    assert name in (tmp_path / "out" / "predictions.csv").read_bytes()


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_a_full_disk_does_not_hide_the_accuracy(run, custom, trained, tmp_path):
    (tmp_path / "test_predictions.npz").symlink_to("/dev/full")
    found = run(*custom, *TRAIN, "--finetune", trained.best, "--output_dir", tmp_path, "--eval")
    assert found.code == 1 and "Traceback" not in found.all and "No space left on device" in found.err, found.all
    assert len(test_metrics_of(log_of(tmp_path))) == 1


def test_predict_prints_five_of_many_and_needs_no_lists(run, clips, tmp_path):
    torch.save({"module": MODELS["vit_tiny_patch16_224"](num_classes=174).state_dict()}, tmp_path / "model.pth")
    argv = ["--data_set", "SSV2", *TINY, "--finetune", tmp_path / "model.pth", "--output_dir", tmp_path]
    found = run(*argv, "--predict", clips["bikes.mp4"])
    rows = [line.split() for line in found.out.splitlines() if line.startswith("0.")]
    assert found.code == 0 and len(rows) == 5 and len({int(label) for _, label in rows}) == 5, found.all


# Frozen evaluation ----------------------------------------------------------------------------------------------


def test_neighbours_among_few_videos(run, custom, trained, data, tmp_path):
    """One of all training videos is left, so that all answers are its class."""
    few = ["--knn", 3, "--num_train_videos", 1, "--output_dir", tmp_path / "few"]
    found = run(*custom, *TRAIN, *few, "--finetune", trained.best)
    assert found.code == 0, found.all
    [(_, label)] = [line.rsplit(" ", 1) for line in (tmp_path / "few" / "train_subset.csv").read_text().splitlines()]
    table = (tmp_path / "few" / "test_per_class.csv").read_text().splitlines()[1:]
    assert all(float(row.split(",")[3]) == 0 for row in table if row.split(",")[0] != label)
    assert any(float(row.split(",")[3]) > 0 for row in table if row.split(",")[0] == label)


@pytest.mark.parametrize("kind, rates", [("--linear_probe", ("3", "1e-7")), ("--attentive_probe", ("0.1", "1e-9"))])
def test_probes_learn_and_leave_the_encoder_alone(run, custom, data, trained, tmp_path, kind, rates):
    """And are tested as they were trained, from the folder's own best."""
    grid = ["--probe_lrs", *rates[::-1], "--probe_wds", "0", "0.05"]
    found = run(*custom, *TRAIN, kind, *grid, "--output_dir", tmp_path, "--finetune", trained.best, "--epochs", "10")
    assert found.code == 0, found.all
    scores = [line for line in log_of(tmp_path) if "val_acc1" in line]
    best = max(scores, key=lambda line: line["val_acc1"])
    assert best["val_acc1"] > 80 and best["val_probe_lr"] == float(rates[0]) and best["val_probe_wd"] in (0, 0.05)
    kept, source = read(tmp_path / "checkpoint-best.pth")["model"], read(trained.best)["model"]
    for name, value in source.items():
        if not name.startswith(("head", "fc_norm")):
            assert torch.equal(kept[f"encoder.{name}"], value), name
    assert len({name.split(".")[1] for name in kept if name.startswith("probes.")}) == 4
    again = run("--data_path", data, *SEEN, "--eval", "--output_dir", tmp_path)
    metrics = test_metrics_of(log_of(tmp_path))
    assert again.code == 0 and len(metrics) == 2 and metrics[0] == metrics[1], again.all


def test_sigmas_linear_probe(run, custom, trained, tmp_path):
    """Head and fc_norm learn, everything else stays as it was; the rate goes by videos."""
    recipe = ["--learn", "head", "--num_sample", 2, "--output_dir", tmp_path / "run"]
    options = [*custom, *TINY, *PLAIN, *recipe, "--batch_size", 3, "--lr", 25.6, "--warmup_epochs", 0]
    found = run(*options, "--finetune", trained.best, "--epochs", 1)
    assert found.code == 0, found.all
    assert "total batch 3 videos (2 clips of each), 2 steps per epoch, 1 epochs, lr 0.3," in found.out
    kept, source = (read(path)["model"] for path in (tmp_path / "run" / "checkpoint-best.pth", trained.best))
    assert kept.keys() == source.keys()
    learned = {name for name in kept if not torch.equal(kept[name], source[name])}
    assert learned == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    again = run(*options, "--eval", "--epochs", 1)
    metrics = test_metrics_of(log_of(tmp_path / "run"))
    assert again.code == 0 and len(metrics) == 2 and metrics[0] == metrics[1], again.all
