"""Saving and loading: atomic writes, exact resume, and reading weights that others have written.

A checkpoint is a dict ``{'model', 'optimizer', 'scaler', 'epoch', 'step', 'args', …}``. ``checkpoint-{epoch}.pth``
ends that epoch (numbered from 0); ``checkpoint-latest.pth`` may lie anywhere inside one. `epoch` and `step` say where
it lies: `step` steps into `epoch`, or at its end if `step` is 0. Files are read with weights_only=True: nothing in them
is ever run.
"""

import argparse
import fcntl
import os
import re
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from optim_factory import Stepper
from utils import RunError, broadcast, logger, rank

LATEST = "checkpoint-latest.pth"
NUMBERED = re.compile(r"checkpoint-(\d+)\.pth")
MODEL_KEYS = ("model", "module", "state_dict", "model_state")
MAX_FAILED_SAVES = 3  # in a row
LOCK_SECONDS = 10.0  # the run that another one replaces may still be dying
HUB = re.compile(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")


def local_path(path: str) -> str:
    """Where a weight file lies: `path` itself, or for ``hf://owner/repo[@revision]/file`` a place in huggingface_hub's
    cache, after fetching it if need be. Its own variables apply: HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN.

    Raises:
        RunError: not of this form, or neither cached nor to be fetched.
    """
    match = HUB.fullmatch(path)
    if not match:
        if path.startswith("hf:"):
            raise RunError(f"{path}: write hf://owner/repo/path/of/the/file")
        return path
    repo, revision, file = match.groups()
    try:
        return hf_hub_download(repo, file, revision=revision)
    except LocalEntryNotFoundError as error:
        raise RunError(
            f"{path} is not in {constants.HF_HUB_CACHE} and cannot be fetched from here: download "
            f"{hf_hub_url(repo, file, revision=revision)} elsewhere and name that file instead, or put "
            f"models--{repo.replace('/', '--')} of another machine's cache into this one"
        ) from error
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be fetched ({str(error).splitlines()[0][:160]})") from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a .pth or .safetensors file to the CPU without running anything in it.

    Released files hold an ``argparse.Namespace`` under ``args``; nothing else but tensors and plain values is allowed.

    Raises:
        RunError: no such file, damaged, or with forbidden contents.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"{path}: no such checkpoint file")
    try:
        if path.suffix == ".safetensors":
            return {"model": load_file(path)}
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums it writes
                damaged = archive.testzip()
            if damaged:
                raise RunError(f"{path}: damaged checkpoint (checksum of {damaged})")
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except RunError:
        raise
    except (Exception, SafetensorError) as error:  # zip, pickle and torch each fail in their own ways
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". In PyTorch")[0]
        raise RunError(f"{path}: not a readable checkpoint ({reason[:120]})") from error
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise RunError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def model_weights(
    checkpoint: dict[str, Any], path: str | Path = "checkpoint", key: str = ""
) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint, under `key` (``one|another``) or whichever is usual, without the prefix of DDP.

    Raises:
        RunError: no state dict in it.
    """
    keys = tuple(key.split("|")) if key else MODEL_KEYS
    state = next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), dict)), {} if key else checkpoint)
    named = all(isinstance(key, str) for key in state)
    weights = (
        {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, torch.Tensor)}
        if named
        else {}
    )
    if not weights:
        raise RunError(f"{path}: no weights in it (looked under {', '.join(keys)})")
    return weights


def check_kind(path: str, name: str, kind: str) -> None:
    """Make sure that a checkpoint is of the right kind before anything is built: that it has weights called `name`.

    Raises:
        RunError: unreadable, or without them.
    """
    if not any(name in own for own in model_weights(read_checkpoint(path), path)):
        raise RunError(f"{path} is not a {kind} checkpoint: it has no {name}")


def load_strictly(model: torch.nn.Module, path: str | Path, key: str = "") -> None:
    """Load all weights of a checkpoint (those under `key`) into a model of the very same shape.

    Raises:
        RunError: unreadable, or of another model.
    """
    weights = model_weights(read_checkpoint(path), path, key)
    own = model.state_dict()
    wrong = [
        f"{name} is {list(weights[name].shape)} there, {list(own[name].shape)} here"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    wrong += [f"{name} is missing there" for name in own if name not in weights]
    wrong += [f"{name} is unknown here" for name in weights if name not in own]
    if wrong:
        raise RunError(
            f"{path} does not fit this model: {wrong[0]} (and {len(wrong) - 1} more); check --model, "
            "--decoder_depth and the target"
        )
    model.load_state_dict(weights)
    logger.info("loaded %d tensors from %s", len(weights), path)


def load_encoder(
    model: torch.nn.Module, path: str | Path, need_head: bool = False, key: str = "", prefix: str = ""
) -> None:
    """Load what fits from a pretraining or a fine-tuned checkpoint into a classifier, and say what did.

    From a pretraining checkpoint the encoder is taken (``encoder.`` or ``backbone.`` prefix). A head for another
    number of classes is left out.

    Args:
        need_head: the model is to be used as it is, so that head and final norm must be there.
        key: where in the file the weights are, or several places with ``|`` between; empty looks.
        prefix: what their names begin with, besides.
    Raises:
        RunError: unreadable, of another size, or without an encoder.
    """
    everything = model_weights(read_checkpoint(path), path, key)
    weights = everything = {name.removeprefix(prefix): value for name, value in everything.items()}
    for usual in ("encoder.", "backbone."):
        inside = {name.removeprefix(usual): value for name, value in weights.items() if name.startswith(usual)}
        weights = inside or weights
    own = model.state_dict()
    fitting = {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape}
    other = [name for name in own if name in weights and name not in fitting and not name.startswith("head.")]
    if other or not any(name.startswith("blocks.") for name in fitting):
        reason = (
            f"{other[0]} is {list(weights[other[0]].shape)} there, {list(own[other[0]].shape)} here"
            if other
            else "no weight of it has a name of this model"
        )
        raise RunError(f"{path} does not fit this model: {reason}; check --model")
    new = [name for name in own if name not in fitting]
    left = [name for name in everything if name.removeprefix("encoder.").removeprefix("backbone.") not in fitting]
    if [name for name in new if name.startswith(("blocks.", "patch_embed.")) or need_head]:
        raise RunError(
            f"{path} lacks {', '.join(new[:4])}"
            + ("; it is not fine-tuned for this number of classes" if need_head else "")
        )
    model.load_state_dict(fitting, strict=False)
    logger.info("%s: loaded %d tensors; new here: %s; left out: %s", path, len(fitting), _names(new), _names(left))


def _names(names: list[str]) -> str:
    """A list of names, cut short."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "none"


def write_atomically(checkpoint: dict[str, Any], path: Path) -> None:
    """Write beside `path`, flush to the disk, then rename over it: `path` is whole at every moment."""
    draft = path.with_suffix(".tmp")
    try:
        with open(draft, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


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


def lock_folder(folder: str) -> Any:
    """Make `folder`, and keep other runs out of it for as long as this process lives.

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


def progress(state: dict[str, Any], path: Path) -> tuple[int, int]:
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
        progress(state, path)
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


def find_resume(folder: str, resume: str, auto_resume: bool) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from: `resume` if named, else the furthest one in `folder` that loads.

    The first process chooses, all read. Files that do not load are named and skipped.
    """
    if resume:
        return Path(resume), read_checkpoint(resume)
    if not (auto_resume and folder):
        return None
    chosen = None
    if rank() == 0:
        readable = (found for found in map(_read_or_warn, resume_candidates(folder)) if found)
        chosen = next(readable, None)
        if chosen and chosen[0].name == LATEST:  # outdated, if the run died before it was removed
            rival = next(readable, None)
            if rival and progress(rival[1], rival[0]) >= progress(chosen[1], chosen[0]):
                chosen = rival
    path = broadcast(chosen and chosen[0])
    if path is None:
        return None
    return chosen or (path, read_checkpoint(path))


def restore(
    found: tuple[Path, dict[str, Any]], model: torch.nn.Module, stepper: Stepper, samples_per_step: int
) -> Position:
    """Put a run's checkpoint back into model and stepper.

    Raises:
        RunError: of another model or program, or in mid-epoch with another number of samples a step.
    """
    path, state = found
    position = Position(*progress(state, path), state.get("meter"))
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
    try:
        model.load_state_dict(model_weights(state, path))
        stepper.load(state, path)
        if not isinstance(position.meter, dict):
            raise ValueError("its meter holds no sums")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is of another run ({str(error).splitlines()[-1].strip()[:200]})") from error
    logger.info("resuming from %s at epoch %d, step %d", path, position.epoch, position.step)
    return position
