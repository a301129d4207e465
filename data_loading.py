"""How samples reach the training loop: their order, the loader, its workers' failures, and the list of bad files."""

import fcntl
import itertools
import signal
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from datasets import Batch, Key, VideoList, collate
from utils import RunError, logger


class ChunkSampler(Sampler[list[Key]]):
    """Which samples make up each micro-batch of this process.

    An epoch is one permutation of the list, cut into optimizer steps of ``chunk * world * update_freq`` samples;
    what is left over is dropped. Chunk j of a step goes to process j % world. So two processes see, step by step,
    what one process sees that accumulates twice as much, and a run can go on with another number of processes.

    Raises:
        ValueError: fewer samples than a step takes.
    """

    def __init__(
        self, num_samples: int, chunk: int, update_freq: int = 1, rank: int = 0, world: int = 1, seed: int = 0
    ):
        self.num_samples, self.chunk, self.update_freq = num_samples, chunk, update_freq
        self.rank, self.world, self.seed = rank, world, seed
        self.samples_per_step = chunk * world * update_freq
        self.steps_per_epoch = num_samples // self.samples_per_step
        self.epoch, self.start_step = 0, 0
        self.issued: deque[list[int]] = deque()  # handed to workers, not yet come back
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{num_samples} videos are fewer than the {self.samples_per_step} of an optimizer step; "
                "lower --batch_size or --update_freq"
            )

    def set_position(self, epoch: int, step: int = 0) -> None:
        """The next pass is over `epoch`, from optimizer step `step` on."""
        self.epoch, self.start_step = epoch, step

    def chunk_id(self, step: int, micro_batch: int) -> int:
        """Number of a chunk within its epoch, the same for any division into processes and micro-batches."""
        return (step * self.update_freq + micro_batch) * self.world + self.rank

    def __len__(self) -> int:
        return self.steps_per_epoch * self.update_freq

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = self.epoch
        order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
        self.issued.clear()
        for step in range(self.start_step, self.steps_per_epoch):
            for micro_batch in range(self.update_freq):
                first = self.chunk_id(step, micro_batch) * self.chunk
                indices = order[first : first + self.chunk].tolist()
                self.issued.append(indices)
                yield [(epoch, index) for index in indices]


def init_worker(worker: int) -> None:
    """One thread a worker, as parallelism is between clips; signals to the whole group are the main process's affair."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def build_loader(
    dataset: Dataset, sampler: ChunkSampler, num_workers: int, pin_mem: bool, timeout: float
) -> DataLoader:
    """A loader of training batches. `timeout`: seconds to wait for one before the run is stopped."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_mem,
        persistent_workers=num_workers > 0,
        timeout=timeout if num_workers else 0,
        worker_init_fn=init_worker,
    )


def last_line(error: Exception) -> str:
    """The end of a message, which may carry a worker's traceback before it; an EOFError has none, and gives its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def loader_failure(error: Exception, issued: deque[list[int]], videos: VideoList) -> RunError:
    """What to tell of a worker that hung or died: the videos of its batches."""
    hangs = "timed out" in str(error)
    flying = itertools.islice(issued, 1 if hangs else None)  # one that died need not be the one waited for
    lost = ", ".join(videos.path(index) for indices in flying for index in indices)
    return RunError(
        f"the data loader failed ({last_line(error)}) on one of: {lost}; take it off "
        "the list, or raise --worker_timeout if storage is slow"
    )


def epoch_batches(loader: DataLoader, videos: VideoList) -> Iterator[Batch]:
    """The batches of the sampler's epoch; a worker that hangs or dies is reported with the videos it had.

    Raises:
        RunError: a worker hung, died, or raised.
    """
    issued = loader.batch_sampler.issued
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RunError as error:  # raised in a worker, whose traceback comes along
            raise RunError(last_line(error).removeprefix("utils.RunError: ")) from error
        except (RuntimeError, OSError, EOFError) as error:  # hung, died, or died while handing over
            raise loader_failure(error, issued, videos) from error
        issued.popleft()
        yield batch


def unbatched(loader: DataLoader, order: range, videos: VideoList) -> Iterator:
    """The samples of a validation or test; a worker that hangs or dies stops the run with the videos it may have had.

    Args:
        order: what the loader's sampler gives.
    Raises:
        RunError: it hung, died, or raised.
    """
    samples, ahead = iter(loader), max(1, loader.num_workers * (loader.prefetch_factor or 1))
    for place in itertools.count():
        try:
            sample = next(samples)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            flying = deque([index] for index in order[place : place + ahead])
            raise loader_failure(error, flying, videos) from error
        yield sample


class BadFiles:
    """Notes files that could not be used, each once, in ``bad_clips.txt``, and stops a run that has too many.

    Processes append to the same file under a lock.
    """

    def __init__(self, output_dir: str, max_fraction: float):
        self.file = Path(output_dir) / "bad_clips.txt" if output_dir else None
        self.max_fraction, self.videos, self.bad = max_fraction, 0, 0
        self.noted: set[str] = set()
        self.first: list[str] = []

    def watch(self, batches: Iterator[Batch], shown: dict[str, float]) -> Iterator[Batch]:
        """Pass batches on, taking note of their bad files and counting the videos among them in `shown`.

        Raises:
            RunError: more than `max_fraction` of the videos, once this process has tried 100.
        """
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
        """Raise RunError if too large a part of the videos could not be read."""
        if bad > self.max_fraction * videos:
            raise RunError(
                f"{bad:.0f} of {videos:.0f} videos could not be read, more than --max_bad_fraction "
                f"{self.max_fraction}; the first: {'; '.join(self.first)}"
            )

    def note(self, path: str, reason: str) -> None:
        """Write a line, unless some process has written it."""
        line = f"{path}\t{reason}".replace("\n", " ")
        self.noted.add(path)
        self.first = (self.first + [f"{path}: {reason}"])[:3]
        logger.warning("cannot use %s: %s", path, reason)
        if self.file:
            try:
                self.append(path, line)
            except OSError as error:
                logger.warning("could not write to %s (%s)", self.file, error.strerror)

    def append(self, path: str, line: str) -> None:
        """Add a line, if there is none of this path."""
        with open(self.file, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if path not in (noted.split("\t")[0] for noted in file.read().splitlines()):
                file.write(line + "\n")
