"""Saving a run and going on with it: atomic writes, exact resume, one run a folder. Reading weights is in weights.py.

A checkpoint is a dict ``{'model', 'optimizer', 'scaler', 'epoch', 'step', 'args', …}``. ``checkpoint-{epoch}.pth``
ends that epoch (numbered from 0); ``checkpoint-latest.pth`` may lie anywhere inside one. `epoch` and `step` say where
it lies: `step` steps into `epoch`, or at its end if `step` is 0.
"""

import fcntl
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from optim_factory import Stepper
from utils import RunError, broadcast, logger, rank, write_whole
from weights import read_checkpoint

LATEST, BEST = "checkpoint-latest.pth", "checkpoint-best.pth"
NUMBERED = re.compile(r"checkpoint-(\d+)\.pth")
MAX_FAILED_SAVES = 3  # in a row
LOCK_SECONDS = 10.0  # the run that another one replaces may still be dying


def write_atomically(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; see utils.write_whole."""
    write_whole(path, lambda file: torch.save(checkpoint, file))


class CheckpointWriter:
    """Saves a run from the first process, and survives a full disk.

    Args:
        folder: OUTPUT_DIR; empty writes nothing.
        every_minutes, every_steps: refresh ``checkpoint-latest.pth``; 0 never.
        keep: numbered checkpoints to keep, 0 for all.
    """

    def __init__(self, folder: str, every_minutes: float = 0, every_steps: int = 0, keep: int = 0):
        self.folder = Path(folder) if folder and rank() == 0 else None
        self.every_minutes, self.every_steps, self.keep = every_minutes, every_steps, keep
        self.failures, self.last_save = 0, time.monotonic()

    def due(self, steps_done: int) -> bool:
        """Whether ``checkpoint-latest.pth`` is to be refreshed after this many steps of the run."""
        by_time = self.every_minutes and time.monotonic() - self.last_save >= 60 * self.every_minutes
        return bool(self.folder and (by_time or (self.every_steps and steps_done % self.every_steps == 0)))

    def save(self, name: str, checkpoint: Callable[[], dict[str, Any]]) -> bool:
        """Write a checkpoint, if this process writes; a failure leaves the old file whole and is reported.

        Returns:
            Whether it was written.
        Raises:
            RunError: the third failure in a row.
        """
        if not self.folder:
            return True
        if name == LATEST or NUMBERED.fullmatch(name):  # what a run can go on from
            self.last_save = time.monotonic()
        try:
            write_atomically(checkpoint(), self.folder / name)
        except (OSError, RuntimeError) as error:  # torch's zip writer raises RuntimeError on a full disk
            self.failures += 1
            reason = str(error).splitlines()[0]
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
        """After a numbered checkpoint: drop those past `keep`, and ``checkpoint-latest.pth``, which it outdates."""
        if not self.folder:
            return
        (self.folder / LATEST).unlink(missing_ok=True)
        numbered = [path for _, path in sorted(numbered_checkpoints(self.folder).items())]
        for path in numbered[: -self.keep] if self.keep else []:
            path.unlink(missing_ok=True)


def lock_folder(folder: str) -> TextIO:
    """Make `folder`, and lock it against other runs until the file that is returned is closed.

    A POSIX record lock: it goes with the process, however that ends, and loader workers do not inherit it.

    Raises:
        RunError: another run holds it, or it cannot be written.
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
                told = f"--output_dir {folder}: another run is writing there; stop it or choose another folder"
                raise RunError(told) from error
            time.sleep(0.2)


def numbered_checkpoints(folder: str | Path) -> dict[int, Path]:
    """``checkpoint-{epoch}.pth`` files of a folder by epoch."""
    found = {path: NUMBERED.fullmatch(path.name) for path in Path(folder).glob("checkpoint-*.pth")}
    return {int(match[1]): path for path, match in found.items() if match}


def resume_candidates(folder: str) -> list[Path]:
    """Checkpoints of a folder: the latest one, then the numbered ones from the last to the first."""
    latest = Path(folder) / LATEST
    return [latest] * latest.exists() + [path for _, path in sorted(numbered_checkpoints(folder).items(), reverse=True)]


def resume_point(state: dict[str, Any], path: Path) -> tuple[int, int]:
    """Epoch and step at which the checkpoint at `path` goes on.

    Raises:
        RunError: they are no numbers.
    """
    epoch, step = state.get("epoch", -1), state.get("step", 0)
    if not (isinstance(epoch, int) and isinstance(step, int) and epoch >= -1 and step >= 0):
        raise RunError(f"{path}: damaged checkpoint (epoch {str(epoch)[:20]!r}, step {str(step)[:20]!r})")
    return (epoch, step) if step else (epoch + 1, 0)


def _read_or_warn(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """A checkpoint, or None and a warning if it cannot be read."""
    try:
        state = read_checkpoint(path)
        resume_point(state, path)
        return path, state
    except RunError as error:
        logger.warning("auto-resume skips %s", error)
        return None


@dataclass
class Position:
    """Where a run goes on: an epoch, optimizer steps done in it, and the meter's state there."""

    epoch: int = 0
    step: int = 0
    meter: dict | None = None


def _furthest_of(folder: str) -> tuple[Path, dict[str, Any]] | None:
    """The furthest checkpoint of a folder that can be read."""
    readable = (found for found in map(_read_or_warn, resume_candidates(folder)) if found)
    chosen = next(readable, None)
    if chosen and chosen[0].name == LATEST:  # outdated, if the run died before it was removed
        rival = next(readable, None)
        if rival and resume_point(rival[1], rival[0]) >= resume_point(chosen[1], chosen[0]):
            return rival
    return chosen


def find_resume(folder: str, resume: str, auto_resume: bool) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from: the furthest of `resume` and of those in `folder` that load, if `auto_resume`.

    A job that names `resume` is started again with the same command, when the folder has gone further. Of equally far
    ones it is `resume`. The first process chooses, all read. Files that do not load are named and skipped.

    Raises:
        RunError: `resume` does not load.
    """
    chosen = None
    if rank() == 0:
        named = (Path(resume), read_checkpoint(resume)) if resume else None
        chosen = _furthest_of(folder) if auto_resume and folder else None
        if named and (not chosen or resume_point(named[1], named[0]) >= resume_point(chosen[1], chosen[0])):
            chosen = named
        elif named and chosen:
            logger.warning(
                "%s has gone further than --resume %s: it wins; --no_auto_resume goes back", chosen[0], resume
            )
    path = broadcast(chosen and chosen[0])
    if path is None:
        return None
    return chosen or (path, read_checkpoint(path))


def restore(
    found: tuple[Path, dict[str, Any]], contents: dict[str, Any], stepper: Stepper, samples_per_step: int
) -> Position:
    """Load a run's checkpoint into `contents`, as far as they have a load_state_dict, and into the stepper.

    Raises:
        RunError: of another model or program, or in mid-epoch with another number of samples a step.
    """
    path, state = found
    position = Position(*resume_point(state, path), state.get("meter"))
    missing = {"epoch", "step", "samples_per_step", "meter", "optimizer", "scaler"} - set(state)
    if missing:
        raise RunError(
            f"{path} holds weights only, nothing to resume from (it lacks {', '.join(sorted(missing))}); "
            "start from its weights with --first_stage_path or --finetune"
        )
    if state["step"] and state["samples_per_step"] != samples_per_step:
        raise RunError(
            f"{path} lies inside an epoch with {state['samples_per_step']} videos a step, now there are "
            f"{samples_per_step}: keep GPUs x batch_size x update_freq as they were"
        )
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
        raise RunError(f"{path} is of another run ({str(error).splitlines()[-1].strip()[:200]})") from error
    logger.info("resuming from %s at epoch %d, step %d", path, position.epoch, position.step)
    return position
