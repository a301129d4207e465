"""Saving and resuming a run: atomic writes, exact resume, one run per folder. Reading weights is in weights.py.

A checkpoint is a dict ``{'model', 'optimizer', 'scaler', 'epoch', 'step', 'args', …}`` saved `step` steps into `epoch`
(numbered from 0), or at its end if `step` is 0. ``checkpoint-{epoch}.pth`` is saved at the end of an epoch,
``checkpoint-latest.pth`` at any time.
"""

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch

from optim_factory import Stepper
from utils import RunError, broadcast, first_line, last_line, logger, rank, write_atomically
from weights import read_checkpoint

Found = tuple[Path, dict[str, Any]]  # a checkpoint: its file and contents
LATEST, BEST = "checkpoint-latest.pth", "checkpoint-best.pth"
NUMBERED = re.compile(r"checkpoint-(\d+)\.pth")
MAX_FAILED_SAVES = 3  # in a row
LOCK_SECONDS = 10.0  # a run that is replaced may still be ending


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; see utils.write_atomically."""
    write_atomically(path, lambda file: torch.save(checkpoint, file))


class CheckpointWriter:
    """Writes checkpoints in the first process only, and nothing if `folder` is empty.

    ``checkpoint-latest.pth`` is due `every_minutes` and `every_steps`; 0: never.
    """

    def __init__(self, folder: str, every_minutes: float = 0, every_steps: int = 0):
        self.folder = Path(folder) if folder and rank() == 0 else None
        self.every_minutes, self.every_steps = every_minutes, every_steps
        self.failures, self.last_save = 0, time.monotonic()

    def due(self, steps_done: int) -> bool:
        """Return whether to save ``checkpoint-latest.pth`` after this many steps of the run."""
        by_time = self.every_minutes and time.monotonic() - self.last_save >= 60 * self.every_minutes
        return bool(self.folder and (by_time or (self.every_steps and steps_done % self.every_steps == 0)))

    def save(self, name: str, checkpoint: Callable[[], dict[str, Any]]) -> bool:
        """Save a checkpoint, if this process saves; returns False and keeps the old file if it could not be written.

        Raises RunError after MAX_FAILED_SAVES failures in a row.
        """
        if not self.folder:
            return True
        if name == LATEST or NUMBERED.fullmatch(name):  # can be resumed from
            self.last_save = time.monotonic()
        try:
            save_checkpoint(checkpoint(), self.folder / name)
        except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError on a full disk
            self.failures += 1
            reason = first_line(error)
            if self.failures >= MAX_FAILED_SAVES:
                raise RunError(
                    f"{self.folder / name}: {self.failures} saves in a row failed ({reason}); free space "
                    "and start the same command again"
                ) from error
            logger.warning("could not write %s (%s); training goes on to the next save", self.folder / name, reason)
            return False
        self.failures = 0
        return True

    def tidy(self) -> None:
        """Remove ``checkpoint-latest.pth``, which a numbered checkpoint has made obsolete."""
        if self.folder:
            (self.folder / LATEST).unlink(missing_ok=True)


def lock_folder(folder: str) -> TextIO:
    """Create `folder`, and lock it against other runs until the returned file is closed.

    A POSIX record lock ends with the process, however that ends, and is not inherited by loader workers. Raises
    RunError if another run holds it, or it cannot be written.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(Path(folder) / ".lock", "w")  # noqa: SIM115 (the caller keeps it open)
    except OSError as error:
        raise RunError(f"--output_dir {folder}: cannot be written ({error.strerror})") from error
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError as error:
            if time.monotonic() > deadline:
                message = f"--output_dir {folder}: another run is writing there; stop it or choose another folder"
                raise RunError(message) from error
            time.sleep(0.2)


def best_of(folder: str) -> str:
    """Return the path of ``checkpoint-best.pth`` in a folder; "" if there is none."""
    path = os.path.join(folder, BEST)
    return path if folder and os.path.isfile(path) else ""


def resume_point(found: Found) -> tuple[int, int]:
    """Return epoch and step at which a checkpoint is resumed. Raises RunError if they are not numbers."""
    path, state = found
    epoch, step = state.get("epoch", -1), state.get("step", 0)
    if not (isinstance(epoch, int) and isinstance(step, int) and epoch >= -1 and step >= 0):
        raise RunError(f"{path}: damaged checkpoint (epoch {str(epoch)[:20]!r}, step {str(step)[:20]!r})")
    return (epoch, step) if step else (epoch + 1, 0)


def _readable(paths: list[Path]) -> Iterator[Found]:
    """Read checkpoints, and skip those that cannot be read with a warning."""
    for path in paths:
        try:
            found = path, read_checkpoint(path)
            resume_point(found)
            yield found
        except RunError as error:
            logger.warning("auto-resume skips %s", error)


@dataclass
class Position:
    """Where a run is resumed: epoch, optimizer steps done in it, and the state of its StepMeter."""

    epoch: int = 0
    step: int = 0
    meter: dict | None = None


def _resumable(folder: str) -> list[Found]:
    """Read the last numbered checkpoint of a folder that can be read, and its ``checkpoint-latest.pth``."""
    latest, paths = Path(folder) / LATEST, Path(folder).glob("checkpoint-*.pth")
    numbered = {int(match[1]): path for path in paths if (match := NUMBERED.fullmatch(path.name))}
    from_last = [numbered[epoch] for epoch in sorted(numbered, reverse=True)]
    found = [*_readable([latest] * latest.exists()), *islice(_readable(from_last), 1)]
    return found[::-1]  # read in the order of the warnings; of equally far ones the numbered one is taken


def find_resume(folder: str, resume: str, auto_resume: bool) -> Found | None:
    """Read the checkpoint to resume from: the furthest of `resume` and, with `auto_resume`, of those in `folder`.

    So a job script that names `resume` can be started again after the folder has gone further; of equally far ones
    `resume` is taken. The first process chooses, all read. Files that cannot be read are skipped with a warning, except
    `resume`, which raises RunError.
    """
    chosen = None
    if rank() == 0:
        named = [(Path(resume), read_checkpoint(resume))] if resume else []
        others = _resumable(folder) if auto_resume and folder else []
        chosen = max([*named, *others], key=resume_point, default=None)  # of equally far ones the first
        if named and chosen and chosen is not named[0]:
            message = "resuming from %s, which is further along than --resume %s (--no_auto_resume: from that)"
            logger.warning(message, chosen[0], resume)
    path = broadcast(chosen and chosen[0])
    return chosen or (path and (path, read_checkpoint(path)))


def restore(found: Found, contents: dict[str, Any], stepper: Stepper, layout: dict[str, int]) -> Position:
    """Load a run's checkpoint into the stepper and those `contents` that have a load_state_dict.

    Args:
        layout: see ChunkSampler.layout.
    Raises:
        RunError: of another model or program, or within an epoch of another layout.
    """
    path, state = found
    position = Position(*resume_point(found), state.get("meter"))
    missing = {"epoch", "step", "samples_per_step", "meter", "optimizer", "scaler"} - set(state)
    if missing:
        raise RunError(
            f"{path} holds weights only, nothing to resume from (it lacks {', '.join(sorted(missing))}); "
            "start from its weights with --first_stage_path or --finetune"
        )
    then = layout | {name: state[name] for name in layout if name in state}
    if then != layout:
        text = "{num_samples} samples, {samples_per_step} per step"
        change = f"{text.format(**then)} (here {text.format(**layout)})"
        if state["step"]:
            raise RunError(
                f"{path} was saved within an epoch of {change}: keep the list, and GPUs x batch_size x update_freq, "
                "until that epoch ends, or choose another --output_dir for a new run"
            )
        logger.warning("%s was saved after an epoch of %s", path, change)
    kept = [name for name, value in contents.items() if hasattr(value, "load_state_dict")]
    if lacking := [name for name in kept if name not in state]:
        raise RunError(f"{path} lacks {', '.join(lacking)}: it is of another program, or of a run without --model_ema")
    try:
        for name in kept:
            contents[name].load_state_dict(state[name])
        stepper.load(state, path)
        if not isinstance(position.meter, dict):
            raise ValueError("its meter holds no sums")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is of another run ({last_line(error)[:200]})") from error
    logger.info("resuming from %s at epoch %d, step %d", path, position.epoch, position.step)
    return position
