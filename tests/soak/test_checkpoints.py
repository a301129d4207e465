"""Damaged, unfitting and malicious checkpoints: each is refused in one line, and none runs anything."""

import copy
import pickle
import time
from collections import Counter

import pytest
import torch

from checkpoints import restore
from optim_factory import Stepper
from soak import mutants
from soak.runs import equal
from utils import RunError
from weights import load_strictly, read_checkpoint


def refused(check, *args):
    """Whether it was refused, in one line; anything but a RunError is let through."""
    try:
        check(*args)
    except RunError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 600, str(error)
        return True
    return False


def test_damaged_files(tmp_path, figure):
    whole, outcomes = mutants.as_bytes(mutants.content()), Counter()
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(whole)
    good = read_checkpoint(path)
    for name, damaged in [*mutants.truncated(whole, 60), *mutants.flipped(whole, 40)]:
        path.write_bytes(damaged)
        kind = name.rsplit("-", 1)[0]
        if refused(read_checkpoint, path):
            outcomes[kind, "refused"] += 1
        else:  # a byte that nobody reads, such as padding or a date: the contents must be the same to the last bit
            assert equal(read_checkpoint(path), good), name
            outcomes[kind, "same contents"] += 1
    for kind in ("cut", "flip-tensor", "flip-pickle"):
        assert outcomes[kind, "same contents"] == 0, kind
    figure(
        f"{outcomes.total()} damaged checkpoints: "
        + ", ".join(f"{kind} {n} {what}" for (kind, what), n in sorted(outcomes.items()))
    )


def restored(state, path):
    """Put a checkpoint's contents back into a fresh model and optimizer; returns the position."""
    model, optimizer = mutants.tiny()
    stepper = Stepper(model, optimizer, torch.device("cpu"), "fp32", 1, lambda step: 0.1, lambda step: 0.1)
    return restore((path, state), {"model": model}, stepper, {"num_samples": 8, "samples_per_step": 4})


def test_weights_of_another_model(tmp_path, figure):
    path, variants = tmp_path / "checkpoint.pth", list(mutants.wrong_weights())
    for name, state in variants:
        torch.save(state, path)
        model, _ = mutants.tiny()
        before = copy.deepcopy(model.state_dict())
        assert refused(load_strictly, model, path), name
        assert equal(before, model.state_dict()), name
        assert refused(lambda: restored(read_checkpoint(path), path)), name
    figure(f"{len(variants)} checkpoints with weights of another model: all refused by load_strictly and by restore")


def test_weights_that_fit_beside_what_does_not(tmp_path, figure):
    path, variants = tmp_path / "checkpoint.pth", list(mutants.wrong_run())
    assert restored(mutants.content(), path).step == 2
    for name, state in variants:
        torch.save(state, path)
        assert refused(lambda: restored(read_checkpoint(path), path)), name
    figure(f"{len(variants)} checkpoints with another optimizer or position: all refused by restore")


def appears(target):
    """Whether a file or folder is there, or is within two seconds; it is removed."""
    for _ in range(20):
        if target.exists():
            target.rmdir() if target.is_dir() else target.unlink()
            return True
        time.sleep(0.1)
    return False


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_in_a_file_is_run(tmp_path, figure):
    path, target, count = tmp_path / "checkpoint.pth", tmp_path / "made", 0
    for attack in mutants.attacks(target).values():
        pickle.loads(pickle.dumps(attack))
        assert appears(target), "it would create the file"
    for name, content in mutants.poisoned(target):
        path.write_bytes(content)
        assert refused(read_checkpoint, path) and not target.exists(), name
        count += 1
    assert not appears(target)
    figure(f"{count} checkpoints with a pickle that would create a file: all refused, the file never created")
