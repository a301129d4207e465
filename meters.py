"""The log of a run (averages over steps, console, ``log.txt``, TensorBoard), and its files that could not be read."""

import datetime
import fcntl
import itertools
import json
import math
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensorboardX import SummaryWriter
from torch.utils.data import DataLoader

from datasets import Batch, ChunkSampler
from lists import VideoList
from utils import RunError, last_line, logger, rank, world_size

MAX_NON_FINITE = 10  # steps in a row


class RunLog:
    """Writes a JSON line for each epoch to ``log.txt``, and TensorBoard scalars; in the first process only.

    Nothing is written for an empty `output_dir` or `log_dir`. A run that resumes at `start_epoch` removes the lines of
    this and later epochs.
    """

    def __init__(self, output_dir: str, log_dir: str, start_epoch: int = 0, start_step: int = 0):
        self.file = Path(output_dir) / "log.txt" if output_dir and rank() == 0 else None
        self.writer = SummaryWriter(log_dir, purge_step=start_step or None) if log_dir and rank() == 0 else None
        if self.file and self.file.exists():
            lines = self.file.read_text().splitlines()
            kept = [line for line in lines if self._epoch_of(line) < start_epoch]
            if len(kept) < len(lines):
                self.file.write_text("".join(f"{line}\n" for line in kept))

    @staticmethod
    def _epoch_of(line: str) -> float:
        """Return the epoch of a line; -1 for a line without one, infinity for a line that was cut off."""
        try:
            return json.loads(line).get("epoch", -1)
        except json.JSONDecodeError:
            return math.inf

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write scalars at an optimizer step."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def epoch(self, values: dict[str, Any]) -> None:
        """Append a line to ``log.txt``."""
        if self.file:
            try:
                with open(self.file, "a") as file:
                    file.write(json.dumps(values) + "\n")
            except OSError as error:  # a full disk; the next checkpoints decide whether the run goes on
                logger.warning("could not write to %s (%s)", self.file, error.strerror)
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        """Flush, and end TensorBoard's thread, which could otherwise fail when the program exits."""
        if self.writer:
            self.writer.close()


class StepMeter:
    """Averages the numbers of each step; keeps them on the device, and reads and logs them every `interval` steps.

    Reading makes the CPU wait for the device; nothing else in a step does. `state` holds the sums of an epoch's earlier
    part, from a checkpoint.
    """

    def __init__(
        self,
        log: RunLog,
        device: torch.device,
        epoch: int,
        epochs: int,
        steps_per_epoch: int,
        interval: int = 10,
        state: dict | None = None,
    ):
        self.log, self.device, self.interval = log, device, interval
        self.epoch, self.epochs, self.steps_per_epoch = epoch, epochs, steps_per_epoch
        state = state or {"sums": {}, "counts": {}, "skipped": 0, "bad_in_a_row": 0}
        self.sums: dict[str, float] = defaultdict(float, state["sums"])
        self.counts: dict[str, float] = defaultdict(float, state["counts"])
        self.skipped, self.bad_in_a_row = state["skipped"], state["bad_in_a_row"]
        self.constants: dict[str, float] = {}  # shown beside the averages: rates, counts
        self.step_time, self._data_time, self._since = 0.0, 0.0, time.perf_counter()
        self._rows: list[tuple[dict[str, torch.Tensor], list[str]]] = []

    def timed(self, batches: Iterator) -> Iterator:
        """Yield the batches, and measure the time spent waiting for them."""
        start = time.perf_counter()
        for batch in batches:
            self._data_time += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def update(self, step: int, values: dict[str, torch.Tensor], sources: list[str]) -> None:
        """Add a step's device scalars, among them ``bad`` (1 = skipped), and the paths of its samples; see flush."""
        self._rows.append(({name: value.detach() for name, value in values.items()}, sources))
        if (step + 1) % self.interval == 0 or step + 1 == self.steps_per_epoch:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Read what has been collected, in all processes, and log it.

        Raises RunError after MAX_NON_FINITE bad steps in a row.
        """
        if not self._rows:
            return
        names = list(self._rows[0][0])
        table = torch.stack([torch.stack([row[name].float() for name in names]) for row, _ in self._rows])
        if world_size() > 1:
            dist.all_reduce(table)
            table /= world_size()
        window: dict[str, list[float]] = defaultdict(list)
        longest = 0
        for row, (_, sources) in zip(table.tolist(), self._rows):
            values = dict(zip(names, row))
            if values.pop("bad"):
                self._report_bad(sources)
                longest = max(longest, self.bad_in_a_row)
                continue
            self.bad_in_a_row = 0
            for name, value in values.items():
                if math.isfinite(value):  # not if a gradient overflowed in fp16, or no object was there
                    self.sums[name] += value
                    self.counts[name] += 1
                    window[name].append(value)
        now, count = time.perf_counter(), len(self._rows)
        timing = {"data_time": self._data_time / count, "step_time": (now - self._since) / count}
        self.step_time = timing["step_time"]
        self._rows, self._data_time, self._since = [], 0.0, now
        shown = {name: sum(values) / len(values) for name, values in window.items()} | self.constants
        self.log.scalars(self.epoch * self.steps_per_epoch + step, shown | timing)
        self._console(step, shown | timing)
        if longest >= MAX_NON_FINITE:
            raise RunError(
                f"{longest} steps in a row had a non-finite loss or gradient; lower --lr, set "
                "--clip_grad or use --precision bf16; the last checkpoint is intact"
            )

    def _report_bad(self, sources: list[str]) -> None:
        if world_size() > 1:
            parts: list[Any] = [None] * world_size()
            dist.all_gather_object(parts, sources)
            sources = [source for part in parts for source in part]
        self.skipped, self.bad_in_a_row = self.skipped + 1, self.bad_in_a_row + 1
        message = "non-finite loss or gradient, step skipped (%d so far); its samples: %s"
        logger.warning(message, self.skipped, ", ".join(sources))

    def _console(self, step: int, values: dict[str, float]) -> None:
        left = (self.epochs - self.epoch) * self.steps_per_epoch - step - 1
        eta = datetime.timedelta(seconds=int(left * values["step_time"]))
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        memory = f"  memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if self.device.type == "cuda" else ""
        logger.info("epoch %d [%d/%d]  %s%s  eta %s", self.epoch, step + 1, self.steps_per_epoch, numbers, memory, eta)

    def averages(self) -> dict[str, float]:
        """Return means over the epoch so far, without skipped steps."""
        means = {f"train_{name}": total / self.counts[name] for name, total in self.sums.items()}
        return means | {"skipped_steps": self.skipped}

    def state(self, ended: bool = False) -> dict[str, Any]:
        """Return what a checkpoint keeps of the epoch so far, or if it has `ended`, for the next one."""
        sums = {} if ended else {"sums": dict(self.sums), "counts": dict(self.counts), "skipped": self.skipped}
        return {"sums": {}, "counts": {}, "skipped": 0, "bad_in_a_row": self.bad_in_a_row} | sums


class BadFiles:
    """Lists files that could not be read in ``bad_clips.txt``, and stops a run that has too many of them.

    All processes append to the file, under a lock, so that each path is in it once.
    """

    def __init__(self, output_dir: str, max_fraction: float):
        self.file = Path(output_dir) / "bad_clips.txt" if output_dir else None
        self.max_fraction, self.videos, self.bad = max_fraction, 0, 0
        self.noted: dict[str, str] = {}  # path → reason

    def watch(self, batches: Iterator, shown: dict[str, float]) -> Iterator:
        """Yield the batches, note their bad files, count the videos among them in `shown`, and check from 100 on."""
        for batch in batches:
            self.videos += len(batch["paths"]) + batch["num_bad_videos"]
            self.bad += batch["num_bad_videos"]
            for path, reason in batch["bad"]:
                if path not in self.noted:
                    self.note(path, reason)
            if self.bad:
                shown["bad_clips"] = self.bad
            if self.videos >= 100:
                self.check(self.bad, self.videos)
            yield batch

    def check(self, bad: float, videos: float) -> None:
        """Raise RunError if too large a fraction of the videos could not be read."""
        first = "; ".join(f"{path}: {reason}" for path, reason in list(self.noted.items())[:3])
        check_bad_fraction(bad, videos, self.max_fraction, f"the first: {first}")

    def note(self, path: str, reason: str) -> None:
        """Write a line, unless another process has written it."""
        self.noted[path] = reason
        logger.warning("cannot use %s: %s", path, reason)
        if not self.file:
            return
        try:
            with open(self.file, "a+", errors="surrogateescape") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                if path not in (noted.split("\t")[0] for noted in file.read().splitlines()):
                    file.write(f"{path}\t{reason}".replace("\n", " ") + "\n")
        except OSError as error:
            logger.warning("could not write to %s (%s)", self.file, error.strerror)


def check_bad_fraction(bad: float, videos: float, limit: float, more: str) -> None:
    """Raise RunError, with `more` in its message, if a larger fraction than `limit` of the videos cannot be read."""
    if bad > limit * videos:
        counts = f"{bad:.0f} of {videos:.0f} videos could not be read"
        raise RunError(f"{counts}, more than --max_bad_fraction {limit}; {more}")


def loader_failure(error: Exception, issued: Iterable[list[int]], videos: VideoList, hung: int = 1) -> RunError:
    """Return the error to raise if a loader worker hung or died, with the videos that it may have been reading.

    Args:
        issued: videos of each batch that is being loaded, the one that is waited for first.
        hung: how many of the first batches may hold the video on which a worker hangs.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise again for each further worker that ends
    hangs = "timed out" in str(error)
    loading = itertools.islice(issued, hung if hangs else None)  # one that died need not be the one waited for
    lost = ", ".join(videos.path(index) for indices in loading for index in indices)
    remedy = "replace it by an empty file, which is skipped, or raise --worker_timeout if storage is slow"
    return RunError(f"the data loader failed ({last_line(error)}) on one of: {lost}; {remedy}")


def guarded(
    loader: DataLoader, videos: VideoList, issued: Callable[[], Iterable[list[int]]], hung: int = 1
) -> Iterator[Any]:
    """Iterate over a loader; raises RunError if a worker hung, died, or raised. Arguments as in loader_failure."""
    try:
        yield from loader
    except RunError as error:  # raised in a worker, whose traceback is part of the message
        raise RunError(last_line(error).removeprefix("utils.RunError: ")) from error
    except (RuntimeError, OSError, EOFError) as error:  # hung, died, or died while sending a batch
        raise loader_failure(error, issued(), videos, hung) from error


def epoch_batches(loader: DataLoader, videos: VideoList) -> Iterator[Batch]:
    """Yield the batches of the sampler's epoch; see guarded."""
    assert isinstance(loader.batch_sampler, ChunkSampler)
    issued = loader.batch_sampler.issued
    for batch in guarded(loader, videos, lambda: issued):
        issued.popleft()
        yield batch
