"""Saving and loading: whole files at every moment, nothing in a file is run, the furthest readable one is found."""

import argparse
import multiprocessing
import re
import resource
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures_video import in_child
from test_weights import flip_a_bit, tiny

import checkpoints
from checkpoints import LATEST, CheckpointWriter, find_resume, lock_folder, restore, save_checkpoint
from datasets import ChunkSampler
from optim_factory import Stepper
from training import Best
from utils import RunError
from weights import read_checkpoint

FORK = multiprocessing.get_context("fork")


def save_epochs(folder, *epochs):
    for epoch in epochs:
        torch.save({"model": tiny().state_dict(), "epoch": epoch, "step": 0}, folder / f"checkpoint-{epoch}.pth")


# Writing --------------------------------------------------------------------------------------------------------


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fill_disk(folder, saves, in_between=False):
    """Save small, then large ones beyond the limit; the number of warnings, and whether each save was written."""
    limit_file_size(200_000)
    writer = CheckpointWriter(str(folder))
    written = [writer.save(LATEST, lambda: {"value": torch.full((10,), 1.0)})]
    for number in range(saves):
        if in_between and number == 2:
            written.append(writer.save("other.pth", lambda: {"value": torch.zeros(10)}))
        written.append(writer.save(LATEST, lambda: {"value": torch.zeros(200_000)}))
    return written


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    """And stops the run with the third failed save in a row."""
    assert in_child(fill_disk, tmp_path, 2) == ([True, False, False], None)
    assert [path.name for path in tmp_path.iterdir()] == [LATEST]  # no draft takes up what room there is
    outcome, error = in_child(fill_disk, tmp_path, 3)
    assert outcome is None and error.startswith("utils.RunError: ")
    assert "checkpoint-latest.pth: 3 saves in a row failed" in error and "free space" in error
    assert torch.equal(read_checkpoint(tmp_path / LATEST)["value"], torch.full((10,), 1.0))


def test_a_save_that_works_forgives_those_that_did_not(tmp_path):
    assert in_child(fill_disk, tmp_path, 4, True) == ([True, False, False, True, False, False], None)


def test_a_failed_save_is_reported(tmp_path, caplog):
    writer = CheckpointWriter(str(tmp_path))
    (tmp_path / "x.pth").mkdir()  # cannot be replaced by a file
    assert not writer.save("x.pth", lambda: {"value": 1})
    assert "could not write" in caplog.text and str(tmp_path / "x.pth") in caplog.text


def save_for_ever(path):
    torch.set_num_threads(1)
    for number in range(10**6):
        save_checkpoint({"value": torch.full((500_000,), float(number))}, path)


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "checkpoint-3.pth"
    for pause in np.linspace(0, 0.05, 8):
        before = path.stat().st_ino if path.exists() else None
        process = FORK.Process(target=save_for_ever, args=(path,))
        process.start()
        end = time.monotonic() + 200
        while not path.exists() or path.stat().st_ino == before:
            assert time.monotonic() < end
        time.sleep(pause)
        process.kill()
        process.join()
        found, state = find_resume(str(tmp_path), "", True)  # a draft left behind is no checkpoint
        assert found == path and len(state["value"].unique()) == 1


def test_when_a_save_is_due(tmp_path, monkeypatch):
    """Without a folder never, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    writer = CheckpointWriter("", every_steps=1)
    assert writer.save("x.pth", lambda: {"value": 1}) and not writer.due(1)
    writer.tidy()
    assert list(tmp_path.iterdir()) == []
    by_steps = CheckpointWriter(str(tmp_path), every_steps=5)
    assert [step for step in range(1, 21) if by_steps.due(step)] == [5, 10, 15, 20]
    by_time, never = CheckpointWriter(str(tmp_path), every_minutes=1e-9), CheckpointWriter(str(tmp_path))
    assert by_time.due(1) and not never.due(1)
    assert not CheckpointWriter(str(tmp_path), every_minutes=10).due(1)


def test_tidy_removes_the_latest_checkpoint_only(tmp_path):
    save_epochs(tmp_path, 2, 9, 10, 100)
    for name in (LATEST, "checkpoint-best.pth", "log.txt"):
        (tmp_path / name).write_bytes(b"x")
    before = {path.name for path in tmp_path.iterdir()}
    CheckpointWriter(str(tmp_path)).tidy()
    assert before - {path.name for path in tmp_path.iterdir()} == {LATEST}


# Where to go on -------------------------------------------------------------------------------------------------


def test_the_highest_number_wins_not_the_last_name(tmp_path):
    """If there is any, and it is to be looked for."""
    assert find_resume(str(tmp_path), "", True) is None and find_resume("", "", True) is None
    save_epochs(tmp_path, 2, 9, 10)
    assert find_resume(str(tmp_path), "", False) is None and find_resume(str(tmp_path / "new"), "", True) is None
    (tmp_path / "checkpoint-99-old.pth").write_bytes(b"x")
    path, state = find_resume(str(tmp_path), "", True)
    assert path.name == "checkpoint-10.pth" and state["epoch"] == 10


@pytest.mark.parametrize("epoch, name", [(3, LATEST), (2, "checkpoint-2.pth")])
def test_the_file_in_mid_epoch_wins_when_it_is_further(tmp_path, epoch, name):
    """It is not after a kill right after a numbered save, before the older file was removed."""
    save_epochs(tmp_path, 2)
    torch.save({"model": {}, "epoch": epoch, "step": 5}, tmp_path / LATEST)
    assert find_resume(str(tmp_path), "", True)[0].name == name


def test_damaged_files_are_named_and_skipped(tmp_path, caplog):
    save_epochs(tmp_path, 1, 2, 3)
    (tmp_path / LATEST).write_bytes(b"")
    (tmp_path / "checkpoint-3.pth").write_bytes((tmp_path / "checkpoint-3.pth").read_bytes()[:500])
    flip_a_bit(tmp_path / "checkpoint-2.pth", read_checkpoint(tmp_path / "checkpoint-2.pth")["model"]["0.weight"])
    assert find_resume(str(tmp_path), "", True)[0].name == "checkpoint-1.pth"
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    names = (LATEST, "checkpoint-3.pth", "checkpoint-2.pth")
    assert len(warnings) == 3 and all(name in text for name, text in zip(names, warnings))
    with pytest.raises(RunError, match="checkpoint-3.pth"):  # one that is named must be readable
        find_resume(str(tmp_path), str(tmp_path / "checkpoint-3.pth"), True)


@pytest.mark.parametrize(
    "auto, epochs, epoch", [(True, (1, 2), 5), (True, (1, 6), 6), (True, (5,), 5), (False, (6,), 5)]
)
def test_the_furthest_of_a_named_checkpoint_and_the_folder_wins(tmp_path, caplog, auto, epochs, epoch):
    """A job that names one is restarted with the same command; without auto-resume there is no other."""
    (tmp_path / "other").mkdir()
    save_epochs(tmp_path / "other", 5)
    save_epochs(tmp_path, *epochs)
    named = tmp_path / "other" / "checkpoint-5.pth"
    path, state = find_resume(str(tmp_path), str(named), auto)
    assert state["epoch"] == epoch and (path == named) == (epoch == 5)
    assert (f"checkpoint-6.pth, which is further along than --resume {named}" in caplog.text) == (epoch == 6)


# One run a folder -----------------------------------------------------------------------------------------------


def hold(folder, pipe):
    """Be another run in a folder."""
    lock = lock_folder(str(folder))
    pipe.send(bool(lock))
    signal.pause()


def test_a_folder_takes_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "LOCK_SECONDS", 0.5)
    ours, theirs = FORK.Pipe()
    holder = FORK.Process(target=hold, args=(tmp_path, theirs), daemon=True)
    holder.start()
    assert ours.recv()
    with pytest.raises(RunError, match=f"--output_dir {tmp_path}: another run"):
        lock_folder(str(tmp_path))
    holder.kill()  # however it ends
    assert lock_folder(str(tmp_path))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--output_dir .*cannot be written"):
        lock_folder(str(tmp_path / "file" / "run"))
    assert lock_folder(str(tmp_path / "new" / "run"))


def test_a_run_with_averaged_weights_resumes_both(tmp_path):
    """The weights that are trained are not replaced by their average."""
    saved, ema, args = tiny(), tiny(), argparse.Namespace(model_ema=True, max_bad_fraction=0.0)
    rest = torch.device("cpu"), "fp32", 1, lambda step: 0.1, lambda step: 0.1
    build = lambda model: Stepper(model, torch.optim.SGD(model.parameters()), *rest)
    place = {"epoch": 0, "step": 2, "samples_per_step": 4, "meter": {}, "args": args}
    state = {"model": saved.state_dict(), "model_ema": ema.state_dict(), **build(saved).state(), **place}
    model, average, layout = tiny(), tiny(), {"num_samples": 8, "samples_per_step": 4}
    contents = {"model": model, "model_ema": average, "args": args}
    assert restore((tmp_path / "x.pth", state), contents, build(model), layout).step == 2
    assert torch.equal(model[0].weight, saved[0].weight) and torch.equal(average[0].weight, ema[0].weight)
    del state["model_ema"]
    with pytest.raises(RunError, match="lacks model_ema: .* without --model_ema"):
        restore((tmp_path / "x.pth", state), contents, build(model), layout)


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("layout", [ChunkSampler(7, 2).layout, ChunkSampler(8, 4).layout])
def test_another_list_or_batch_resumes_only_between_epochs(tmp_path, caplog, layout, step):
    """Within one, the permutation of the list would be another, or steps would be repeated."""
    model = tiny()
    rest = torch.device("cpu"), "fp32", 1, lambda step: 0.1, lambda step: 0.1
    build = lambda: Stepper(model, torch.optim.SGD(model.parameters()), *rest)
    place = {"epoch": 3, "step": step, "meter": {}, **ChunkSampler(8, 2).layout}
    state, path = {"model": model.state_dict(), **build().state(), **place}, tmp_path / "x.pth"
    resume = lambda layout: restore((path, state), {"model": model}, build(), layout)
    assert resume(ChunkSampler(8, 1, 2).layout).step == step and "was saved" not in caplog.text
    here = "8 samples, 2 per step (here {num_samples} samples, {samples_per_step} per step)".format(**layout)
    if step:
        with pytest.raises(RunError, match=re.escape(f"x.pth was saved within an epoch of {here}: keep the list")):
            resume(layout)
    else:
        assert resume(layout).epoch == 4 and f"x.pth was saved after an epoch of {here}" in caplog.text


@pytest.mark.parametrize("smaller_is_better, best, epoch", [(False, 5, 2), (True, 2, 1)])
def test_the_best_validation_is_the_last_whose_weights_were_written(smaller_is_better, best, epoch):
    """The largest number, or where it is an error the smallest; not that of the epoch with a full disk."""
    kept = Best("number", smaller_is_better)
    for index, (number, room) in enumerate([(3, True), (2, True), (5, True), (9, False), (1, False), (3, True)]):
        shown = {}
        kept.update(SimpleNamespace(index=index, save=lambda name, room=room: room, shown=shown), {"number": number})
        assert shown == {"val_number": number}
    assert kept.state_dict() == {"number": best, "epoch": epoch}
    again = Best("number", smaller_is_better)
    again.load_state_dict(kept.state_dict())
    assert (again.value, again.epoch) == (best, epoch)
