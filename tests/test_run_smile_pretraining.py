"""The pretraining program as it is used: both stages, two processes, kills and signals, dry runs."""

import io
import os
import re
import shutil
import signal
import struct
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures_pretraining import EPOCHS, STEPS, TINY, TRAIN, last_weights, weights_of
from fixtures_programs import log_of
from tensorboardX.proto.event_pb2 import Event

from checkpoints import LATEST
from modeling_pretrain import MODELS
from weights import read_checkpoint

pytest_plugins = "fixtures_pretraining"
LONG = ["--epochs", "200", "--stop_epoch", "200", "--save_ckpt_freq", "200"]


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def same_as(reference, folder):
    """Whether a run's losses and last weights are, bit by bit, those of the reference."""
    logs = [
        [(line["epoch"], line["train_loss"], line["train_grad_norm"], line["lr"]) for line in log_of(where)]
        for where in (reference.folder, folder)
    ]
    return logs[0] == logs[1] and largest_difference(last_weights(reference.folder), last_weights(folder)) == 0


# An undisturbed run ---------------------------------------------------------------------------------------------


def test_what_a_run_writes(reference, broken, objects_folder):
    names = {path.name for path in reference.folder.iterdir()} - {".lock"}
    assert names == {"checkpoint-0.pth", "checkpoint-1.pth", "log.txt", "bad_clips.txt", "tb"}
    state = read_checkpoint(reference.folder / "checkpoint-1.pth")
    assert {"model", "optimizer", "scaler", "epoch", "args"} <= state.keys() and state["epoch"] == 1
    assert state["args"].mask_ratio == 0.7 and len(state["optimizer"]["state"]) == len(state["model"])
    student = MODELS["pretrain_videomae_tiny_patch16_224"](decoder_depth=1, decoder_num_classes=1536)
    student.load_state_dict(state["model"])
    bad = [line.split("\t")[0] for line in (reference.folder / "bad_clips.txt").read_text().splitlines()]
    assert set(bad) <= {str(broken["text"]), str(objects_folder / "bar" / "broken.png")} and len(bad) == len(set(bad))
    assert bad, "in 96 draws there is a broken one"


def test_what_a_run_logs(reference):
    log = log_of(reference.folder)
    assert [line["epoch"] for line in log] == [0, 1] and all(line["steps"] == STEPS for line in log)
    for line in log:
        names = "train_loss train_grad_norm train_pred_std train_target_std lr weight_decay seconds".split()
        assert all(np.isfinite(line[name]) for name in names)
    assert 0.5 < log[1]["train_loss"] < log[0]["train_loss"] < 4  # it learns
    assert "1 process(es) x 4 clips x 2 accumulated = total batch 8, fp32 on cpu" in reference.out
    assert f"2 clips of each: {STEPS} steps per epoch" in reference.out
    assert "training 2 of 3 scheduled epochs: 4 as the paper counts" in reference.out
    lines = [line for line in reference.out.splitlines() if f"/{STEPS}]" in line]
    assert len(lines) == EPOCHS * STEPS
    assert all(word in lines[3] for word in ("loss ", "lr ", "grad_norm ", "data_time ", "step_time ", "eta "))


def test_the_same_command_again_has_nothing_to_do(start, data_args, reference):
    before = {path: path.stat().st_mtime_ns for path in reference.folder.glob("*.[pt]*") if path.is_file()}
    result = start(*TINY, *TRAIN, *data_args, "--update_freq", 2, "--output_dir", reference.folder).end()
    assert result.code == 0 and f"resuming from {reference.folder / 'checkpoint-1.pth'} at epoch 2" in result.out
    assert before == {path: path.stat().st_mtime_ns for path in before}


# Two processes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(start, shard_args, reference, tmp_path_factory):
    """The reference run over again by two processes over Gloo, with half the accumulation and from tar files."""
    folder = tmp_path_factory.mktemp("two")
    folders = ["--output_dir", folder, "--log_dir", folder / "tb"]
    result = start(*TINY, *TRAIN, *shard_args, "--update_freq", 1, *folders, processes=2).end()
    assert result.code == 0, result.all
    return SimpleNamespace(folder=folder, out=result.out)


def test_two_processes_reach_the_weights_of_one(reference, two_processes):
    """The same clips, masks, drop path and second masks, so the same weights."""
    assert "2 process(es) x 4 clips x 1 accumulated = total batch 8" in two_processes.out
    first, last = weights_of(reference.folder / "checkpoint-0.pth"), last_weights(reference.folder)
    assert largest_difference(first, last) > 1e-3
    assert largest_difference(last_weights(two_processes.folder), last) < 1e-5
    for one, two in zip(log_of(reference.folder), log_of(two_processes.folder), strict=True):
        assert one["lr"] == two["lr"] and one["bad_clips"] == two["bad_clips"]
        for name in ("train_loss", "train_grad_norm", "train_pred_std", "train_target_std"):
            assert one[name] == pytest.approx(two[name], rel=0.05 if "std" in name else 1e-4), name  # std: of one pass
    assert (two_processes.folder / "bad_clips.txt").read_text().count("text.mp4\t") == 1


def read_events(folder):
    """(step, name, value) of all scalars below a folder: records of length, checksum, event, checksum."""
    found = []
    for path in Path(folder).iterdir():
        stream = io.BytesIO(path.read_bytes())
        while header := stream.read(12):
            event = Event.FromString(stream.read(struct.unpack("<Q", header[:8])[0]))
            stream.read(4)
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_has_every_step(two_processes):
    events = read_events(two_processes.folder / "tb")
    for name in ("loss", "lr", "grad_norm", "pred_std", "target_std", "data_time", "step_time"):
        assert [step for step, tag, _ in events if tag == name] == list(range(EPOCHS * STEPS)), name
    losses = [value for _, tag, value in events if tag == "loss"]
    assert np.mean(losses[:STEPS]) == pytest.approx(log_of(two_processes.folder)[0]["train_loss"], rel=1e-5)


# Kills and signals ----------------------------------------------------------------------------------------------


def stopped(start, number, text, folder, *command):
    """A run that got a signal when it had said a text; started anew if it was through before the signal came."""
    for _ in range(4):
        run = start(*command)
        run.wait_for(text)
        with suppress(ProcessLookupError):
            os.kill(run.pid, number)
        result = run.end()
        if result.code != 0 and (number == signal.SIGKILL or (folder / LATEST).exists()):
            break
        shutil.rmtree(folder)
    return result


def test_a_killed_run_goes_on_as_if_it_had_not_been(start, data_args, reference, tmp_path):
    command = [*TINY, *TRAIN, *data_args, "--update_freq", 2, "--output_dir", tmp_path]
    result = stopped(start, signal.SIGKILL, f"epoch 1 [2/{STEPS}]", tmp_path, *command)
    assert result.code == -signal.SIGKILL and len(log_of(tmp_path)) == 1
    again = start(*command).end()
    assert again.code == 0 and f"{tmp_path / 'checkpoint-0.pth'} at epoch 1, step 0" in again.out
    assert same_as(reference, tmp_path)


def test_a_run_killed_in_mid_epoch_goes_on_from_the_latest_file_and_tar_files(start, shard_args, reference, tmp_path):
    """With videos and objects in tar files: the clips are, bit by bit, those of the reference's files."""
    command = [*TINY, *TRAIN, *shard_args, "--update_freq", 2, "--output_dir", tmp_path, "--save_ckpt_steps", 5]
    stopped(start, signal.SIGKILL, f"epoch 0 [8/{STEPS}]", tmp_path, *command)
    again = start(*command).end()
    assert again.code == 0 and re.search(rf"{LATEST} at epoch 0, step (5|10)\n", again.out)
    assert same_as(reference, tmp_path)


def test_a_run_that_is_stopped_saves_itself_and_goes_on_exactly(start, data_args, reference, tmp_path):
    command = [*TINY, *TRAIN, *data_args, "--output_dir", tmp_path]
    result = stopped(start, signal.SIGTERM, f"epoch 1 [2/{STEPS}]", tmp_path, *command, "--update_freq", 2)
    assert result.code == 85 and "Traceback" not in result.err and "error: " not in result.err
    state = read_checkpoint(tmp_path / LATEST)
    assert state["epoch"] == 1 and 2 <= state["step"] < STEPS
    assert f"stopped by a signal: saved at epoch 1, step {state['step']}" in result.out
    other = start(*command, "--update_freq", 1).end()
    assert other.code == 1 and "samples, 4 per step (here" in other.err
    again = start(*command, "--update_freq", 2).end()
    assert again.code == 0 and f"{LATEST} at epoch 1, step {state['step']}" in again.out
    assert same_as(reference, tmp_path) and not (tmp_path / LATEST).exists()


def test_a_run_goes_on_with_options_that_were_changed(start, data_args, reference, tmp_path):
    """Between epochs: the batch and the rate are those of the new command, the weights those of the checkpoint."""
    shutil.copy(reference.folder / "checkpoint-0.pth", tmp_path)
    changed = "--lr 0 --min_lr 0 --batch_size 8 --update_freq 2".split()
    result = start(*TINY, *TRAIN, *data_args, *changed, "--output_dir", tmp_path).end()
    assert result.code == 0 and "checkpoint-0.pth at epoch 1, step 0" in result.out, result.err
    [line] = log_of(tmp_path)
    assert (line["epoch"], line["steps"], line["lr"]) == (1, STEPS // 2, 0) and line["train_loss"] > 0
    assert largest_difference(last_weights(tmp_path), weights_of(tmp_path / "checkpoint-0.pth")) == 0


def test_a_run_in_fp16_goes_on_with_its_loss_scale(start, data_args, tmp_path):
    """What `--precision auto` is on a V100."""
    small = ["--input_size", 32, "--precision", "fp16", "--stop_epoch", 1]
    options = [*TINY, *TRAIN, *data_args, "--update_freq", 2, *small]
    whole, told = ([*options, "--output_dir", tmp_path / name] for name in "ab")
    undisturbed = start(*whole).end()
    assert undisturbed.code == 0 and "fp16 on cpu" in undisturbed.out, undisturbed.err
    result = stopped(start, signal.SIGTERM, f"epoch 0 [7/{STEPS}]", tmp_path / "b", *told)
    assert result.code == 85, result.err
    early = read_checkpoint(tmp_path / "b" / LATEST)["scaler"]
    assert early["scale"] > 1 and early["_growth_tracker"] > 0
    assert start(*told).end().code == 0
    one, other = (read_checkpoint(tmp_path / name / "checkpoint-0.pth") for name in "ab")
    assert one["scaler"] == other["scaler"] and one["scaler"]["_growth_tracker"] > early["_growth_tracker"]
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    assert all(np.isfinite(line["train_loss"]) for line in log_of(tmp_path / "b"))


def test_a_run_that_saves_nothing_does_not_say_that_it_saved(start, data_args):
    run = start(*TINY, *TRAIN, *data_args, *LONG)
    run.wait_for("epoch 0 [2/")
    os.kill(run.pid, signal.SIGTERM)
    result = run.end()
    assert result.code == 85 and "stopped by a signal: not saved at epoch 0" in result.out, result.err[-500:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_whole_process_group_is_survived(start, data_args, tmp_path, number):
    """As Slurm, torchrun and Ctrl-C send it: to the loader's workers too."""
    run = start(*TINY, *TRAIN, *data_args, "--output_dir", tmp_path, *LONG, "--num_workers", 2)
    run.wait_for("epoch 1 [2/")
    os.killpg(run.pid, number)
    result = run.end()
    assert result.code == 85 and "stopped by a signal: saved at epoch" in result.out, result.err[-500:]


def test_a_worker_that_is_killed_ends_the_run_with_one_line(start, data_args, tmp_path):
    """For example by the kernel, out of memory; wherever the main process happens to be."""
    run = start(*TINY, *TRAIN, *data_args, "--output_dir", tmp_path, *LONG)
    run.wait_for("epoch 0 [3/")
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert workers
    for pid in workers:
        os.kill(int(pid), signal.SIGKILL)
    result = run.end()
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 1 and len(lines) == 1 and "data loader" in lines[0] and ".mp4" in lines[0], result.err[-1000:]
    assert "Traceback" not in result.err


# Stage 2 --------------------------------------------------------------------------------------------------------


def test_stage_2_starts_with_the_weights_of_stage_1(start, data_args, reference, tmp_path):
    """With a learning rate of 0 they are still there after an epoch, next to an optimizer that has made 12 steps."""
    first = ["--first_stage_path", reference.folder / "checkpoint-1.pth", "--mask_type", "tube"]
    command = [*TINY, *data_args[:2], *"--batch_size 4 --warmup_epochs 0 --output_dir".split(), tmp_path, *first]
    result = start(*command, *"--epochs 1 --lr 0 --min_lr 0".split()).end()
    assert result.code == 0 and f"tensors from {reference.folder / 'checkpoint-1.pth'}" in result.out
    state = read_checkpoint(tmp_path / "checkpoint-0.pth")
    assert largest_difference(state["model"], last_weights(reference.folder)) == 0 and state["epoch"] == 0
    assert {float(moments["step"]) for moments in state["optimizer"]["state"].values()} == {STEPS}
    assert log_of(tmp_path)[0]["train_loss"] > 0
    result = start(*command, *"--epochs 2 --lr 0.05".split()).end()  # and then it trains
    assert result.code == 0 and f"resuming from {tmp_path / 'checkpoint-0.pth'}" in result.out  # not from stage 1's
    assert largest_difference(last_weights(tmp_path), last_weights(reference.folder)) > 1e-4


def test_stage_2_does_not_go_on_with_that_of_another_stage_1(start, data_args, reference, tmp_path):
    """Nor does a run change its clips and masks without a word."""
    first, other = tmp_path / "first.pth", tmp_path / "other.pth"
    shutil.copy(reference.folder / "checkpoint-1.pth", first)
    shutil.copy(reference.folder / "checkpoint-0.pth", other)
    options = [*"--batch_size 4 --lr 0 --min_lr 0 --epochs 2 --output_dir".split(), tmp_path]
    command = [*TINY, *data_args[:2], *options, "--mask_type", "tube", "--first_stage_path"]
    assert (result := start(*command, first, "--stop_epoch", 1).end()).code == 0, result.err
    refused = start(*command, other).end()
    assert refused.code == 1 and f"started from {first}, not from {other}" in refused.err
    assert "was trained with" not in refused.out
    changed = start(*command, first, "--traj_unmask_ratio", 0.2, "--num_rois", 1, "--num_workers", 1).end()
    text = "was trained with --num_rois 2 (here 1), --traj_unmask_ratio 0.1 (here 0.2)\n"
    assert changed.code == 0 and text in changed.out, changed.err


# Without natural video ------------------------------------------------------------------------------------------


def test_both_stages_without_a_video_go_on_exactly(start, objects_folder, tmp_path):
    """Of the data there are the object images alone. Stage 2 has no natural clips: its objects go on moving."""
    objects = ["--add_tubelets", "--use_objects", "--objects_path", objects_folder]
    command = [*TINY, *TRAIN, "--epoch_size", 2 * STEPS, *objects]
    first = ["--first_stage_path", tmp_path / "whole noise" / f"checkpoint-{EPOCHS - 1}.pth"]
    for kind, options in (("noise", ["--mask_type", "tubelet"]), ("black", first)):
        whole, parts = tmp_path / f"whole {kind}", tmp_path / f"parts {kind}"
        options = [*options, "--background", kind]
        result = start(*command, *options, "--output_dir", whole).end()
        assert result.code == 0 and f"{2 * STEPS} x {kind}, 2 clips of each: {STEPS} steps" in result.out, result.err
        assert not (whole / "bad_clips.txt").exists() or ".mp4" not in (whole / "bad_clips.txt").read_text()
        options += ["--output_dir", parts]
        result = stopped(start, signal.SIGTERM, f"epoch 1 [2/{STEPS}]", parts, *command, *options)
        assert result.code == 85, result.err
        again = start(*command, *options).end()
        assert again.code == 0 and f"{LATEST} at epoch 1, step" in again.out
        assert same_as(SimpleNamespace(folder=whole), parts)


def test_a_dry_run_without_video(start, objects_folder, tmp_path):
    objects = ["--add_tubelets", "--use_objects", "--objects_path", objects_folder, "--mask_type", "tubelet"]
    command = [*TINY, *TRAIN, "--background", "noise", "--epoch_size", 8, *objects, "--dry_run"]
    result = start(*command, "--output_dir", tmp_path / "run").end()
    assert result.code == 0 and "dry run: 4 steps went well" in result.out and list(tmp_path.iterdir()) == []
    result = start(*TINY, *TRAIN, "--background", "black", "--epoch_size", 8, "--dry_run").end()
    assert result.code == 0 and "without --add_tubelets: there is nothing in the clips to be learned" in result.out


# Dry runs -------------------------------------------------------------------------------------------------------


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_times_its_last_steps_and_writes_nothing(start, data_args, reference, tmp_path):
    folders = ["--output_dir", tmp_path / "run", "--log_dir", tmp_path / "tb"]
    long = ["--epochs", 60000, "--stop_epoch", 50000, "--log_interval", 3, "--update_freq", 2]
    result = start(*TINY, *TRAIN, *data_args, *long, "--dry_run", *folders).end()
    assert result.code == 0 and "dry run: 5 steps went well" in result.out and list(tmp_path.iterdir()) == []
    times = [float(time) for time in re.findall(r"loss .* step_time ([\d.e-]+)", result.out)]
    text = r"([\d.]+) s per step \(.* last 3\), ([\d.]+) samples .*: (\d+) steps .* ([\d.]+) hours"
    said = re.search(text, result.out)
    step, speed, steps, hours = (float(number) for number in said.groups())
    assert len(times) == 5 and step == pytest.approx(sorted(times[2:])[1])  # the first two start things up
    assert speed == pytest.approx(4 * 2 / step, rel=1e-2) and steps == 50000 * STEPS
    assert hours == pytest.approx(steps * step / 3600, rel=1e-2)
    before = contents(reference.folder)
    folders = ["--output_dir", reference.folder, "--log_dir", reference.folder / "tb"]
    options = ["--update_freq", 2, "--dry_run", "--stop_epoch", EPOCHS + 1, *folders]
    result = start(*TINY, *TRAIN, *data_args, *options).end()
    assert result.code == 0 and f": {STEPS} steps would take" in result.out and contents(reference.folder) == before
