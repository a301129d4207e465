"""From a line of a list to a batch of clips with masks: the pretraining dataset, order, loader.

The run's seed and the key (epoch, index) of a sample seed the one Generator that goes to frame sampling, crop, overlay
and mask: a clip is the same whatever the number of workers or processes, and after a resume. Clips stay uint8 until
they are on the device. Lists are read in lists.py; labelled data sets are in datasets_finetune.py.
"""

import json
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from lists import VideoList, find_files, list_of
from masking_generator import MaskGenerator
from object_overlay import IMAGE_SUFFIXES, ObjectOverlay
from utils import STOP_SIGNALS, RunError, logger
from video_reader import Clip, VideoError
from video_transforms import ClipSource

MAX_BAD_IN_A_ROW = 20
CHECK_PROGRAM = str(Path(__file__).with_name("video_check.py"))
Key = tuple[int, int]  # epoch, index


def find_images(folder: str) -> VideoList:
    """List the images in a folder and all below it. Raises ValueError if there are none, or no such folder."""
    paths = find_files(folder, IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"data_path {folder}: not a folder with images ({', '.join(IMAGE_SUFFIXES)})")
    return list_of(folder, paths)


class VideoCheck:
    """Checks `count` videos, spread over the list, while networks are being built; warns of wrong and slow ones.

    The check runs in a process of its own (video_check.py), as there are files on which the decoder hangs. It ends
    after some `seconds`, however many videos are left. `size` is the side of the clips in pixels.
    """

    def __init__(self, videos: VideoList, size: int, reader: str = "pyav", count: int = 20, seconds: float = 15):
        self.source, self.paths = videos.source, [videos.path(index) for index in videos.spread(count)]
        self.seconds, self.end = seconds, time.monotonic() + seconds
        command = [sys.executable, CHECK_PROGRAM, str(size), reader, *self.paths]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def report(self) -> None:
        """Wait for the process, as long as there is time, and warn of what it found."""
        try:
            answers, _ = self.process.communicate(timeout=max(0, self.end - time.monotonic()))
            lost = f"the process that read it ended with code {self.process.returncode}"
        except subprocess.TimeoutExpired:
            self.process.kill()
            answers, _ = self.process.communicate()
            lost = f"not read within {self.seconds:g} s (slow storage, or the decoder hangs)"
        found = [json.loads(line) for line in answers.splitlines()]
        if self.process.returncode and len(found) < len(self.paths):
            found.append(["", lost])
        for what, reasons in zip(("give wrong frames", "are slow to load"), zip(*found)):
            if bad := [f"{path}: {reason}" for path, reason in zip(self.paths, reasons) if reason]:
                logger.warning(
                    "%s: %d of %d checked videos %s, for example %s. scripts/data/check_videos.py finds all of them, "
                    "scripts/data/resize_videos.py re-encodes them (DATASET.md)",
                    *(self.source, len(bad), len(found), what, bad[0]),
                )


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator of one sample."""
    return np.random.default_rng((seed, epoch, index))


class Sample(TypedDict):
    """V views of one video."""

    clips: np.ndarray  # uint8 [V, T, H, W, 3]
    masks: NotRequired[np.ndarray]  # pretraining: bool [V, N]
    objects: NotRequired[np.ndarray]  # pretraining with an overlay: tokens under objects, bool [V, N]
    labels: NotRequired[np.ndarray]  # fine-tuning: int [V], or with several labels a video float [V, C]
    erase: NotRequired[np.ndarray]  # fine-tuning: seeds of random erasing, int64 [V]
    path: str
    bad: list[tuple[str, str]]  # files that could not be used, and why; the videos among them come first
    num_bad_videos: int


class Batch(TypedDict):
    """Samples stacked; B = samples times views."""

    clips: torch.Tensor  # uint8 [B, 3, T, H, W], memory format channels_last_3d
    masks: NotRequired[torch.Tensor]  # bool [B, N]
    objects: NotRequired[torch.Tensor]  # bool [B, N]
    labels: NotRequired[torch.Tensor]  # int64 [B], or float [B, C]
    erase: NotRequired[torch.Tensor]  # int64 [B]
    paths: list[str]
    bad: list[tuple[str, str]]
    num_bad_videos: int


def collate(samples: list[Sample]) -> Batch:
    """Stack samples into a batch, views of a video side by side."""
    arrays = [name for name, value in samples[0].items() if isinstance(value, np.ndarray)]
    stacked = {name: torch.from_numpy(np.concatenate([dict(one)[name] for one in samples])) for name in arrays}
    stacked["clips"] = stacked["clips"].permute(0, 4, 1, 2, 3)
    others = {
        "paths": [sample["path"] for sample in samples],
        "bad": [entry for sample in samples for entry in sample["bad"]],
        "num_bad_videos": sum(sample["num_bad_videos"] for sample in samples),
    }
    return cast(Batch, stacked | others)


def read_or_replace(
    rng: np.random.Generator, videos: VideoList, index: int, read: Callable[[str], Clip]
) -> tuple[Clip, int, list[tuple[str, str]]]:
    """Read video `index`; on failure, another one drawn from `rng`.

    Returns:
        the frames, the index they come from, and the bad (path, reason) pairs on the way.
    Raises:
        RunError: MAX_BAD_IN_A_ROW videos in a row could not be read.
    """
    bad: list[tuple[str, str]] = []
    while len(bad) < MAX_BAD_IN_A_ROW:
        try:
            return read(videos.path(index)), index, bad
        except VideoError as error:
            bad.append((videos.path(index), str(error)))
            index = int(rng.integers(len(videos)))
    first = "; ".join(f"{path}: {reason}" for path, reason in bad[:3])
    raise RunError(f"{videos.source}: {len(bad)} videos in a row could not be read, the first: {first}")


class VideoDataset(Dataset):
    """Samples of the videos of a list."""

    videos: VideoList

    def __len__(self) -> int:
        return len(self.videos)


class VideoStream(IterableDataset):
    """Samples of the videos `mine` (indices in the list), one video after the other, shared among loader workers."""

    def __init__(self, videos: VideoList, mine: Sequence[int]):
        self.videos, self.mine = videos, mine

    def samples(self, index: int) -> Iterator[Any]:
        """Yield the samples of a video, dictionaries with `index` and `last`, which is True in the last one."""
        raise NotImplementedError

    def shares(self, workers: int) -> list[Sequence[int]]:
        """Return the indices of the videos that each worker reads."""
        return [self.mine[worker::workers] for worker in range(workers)]

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        for index in self.shares(worker.num_workers)[worker.id] if worker else self.mine:
            yield from self.samples(index)


@dataclass(eq=False)
class PretrainDataset(VideoDataset):
    """Clips with masks: decoding, crop, overlay, mask."""

    videos: VideoList
    source: ClipSource
    masks: MaskGenerator
    overlay: ObjectOverlay | None  # pastes objects (stage 1)
    num_views: int = 1  # independent crops, overlays and masks of each decoded window
    seed: int = 0

    def __getitem__(self, key: Key) -> Sample:
        rng = sample_rng(self.seed, *key)
        found, index, bad = read_or_replace(rng, self.videos, key[1], lambda path: self.source.read(rng, path))
        clips = np.empty((self.num_views, *self.source.shape), np.uint8)
        boxes, masks = zip(*(self.view(rng, found.frames, clip) for clip in clips))
        arrays = {"clips": clips, "masks": np.stack(masks)}
        if self.overlay:
            arrays["objects"] = np.stack([self.masks.under(view) for view in boxes])
        path, num_bad_videos = self.videos.path(index), len(bad)
        if self.overlay and self.overlay.library:
            bad += self.overlay.library.take_skipped()
        return cast(Sample, {**arrays, "path": path, "bad": bad, "num_bad_videos": num_bad_videos})

    def view(
        self, rng: np.random.Generator, frames: np.ndarray, clip: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Make a training clip of decoded frames, into `clip` uint8 ``[T, H, W, 3]``.

        Returns:
            boxes of the objects ``[K, T, 4]``, None without overlay, and the mask, bool ``[N]``.
        """
        self.source.crop(rng, frames, clip)
        try:
            boxes = self.overlay(rng, clip) if self.overlay else None
        except RuntimeError as error:  # a worker's RuntimeError would be reported as a crash of the loader
            raise RunError(f"--{error}") from error
        return boxes, self.masks(rng, boxes)


class ChunkSampler(Sampler[list[Key]]):
    """Yields the keys of each micro-batch of this process.

    An epoch is one permutation of the list, cut into optimizer steps of ``chunk * world * update_freq`` samples; the
    rest is dropped. Chunk j of a step goes to process j % world. So two processes see, step by step, the samples of one
    process that accumulates twice as much, and a run can resume with another number of processes.
    """

    def __init__(
        self, num_samples: int, chunk: int, update_freq: int = 1, rank: int = 0, world: int = 1, seed: int = 0
    ):
        self.num_samples, self.chunk, self.update_freq = num_samples, chunk, update_freq
        self.rank, self.world, self.seed = rank, world, seed
        self.samples_per_step = chunk * world * update_freq
        self.steps_per_epoch = num_samples // self.samples_per_step
        self.epoch, self.start_step = 0, 0
        self.issued: deque[list[int]] = deque()  # handed to workers, not yet received
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{num_samples} videos are fewer than the {self.samples_per_step} of an optimizer step; "
                "lower --batch_size or --update_freq"
            )

    @property
    def layout(self) -> dict[str, int]:
        """What must stay the same until an epoch ends, so that the rest of it holds the samples that are left."""
        return {"num_samples": self.num_samples, "samples_per_step": self.samples_per_step}

    def set_position(self, epoch: int, step: int = 0) -> None:
        """Start the next pass at an optimizer step of an epoch."""
        self.epoch, self.start_step = epoch, step

    def chunk_id(self, step: int, micro_batch: int) -> int:
        """Return the index of a chunk within its epoch, for any division into processes and micro-batches."""
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
    """Use one thread per worker, and leave signals to the main process."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def build_loader(
    dataset: Dataset,
    sampler: ChunkSampler,
    num_workers: int,
    pin_mem: bool,
    timeout: float,
    collate: Callable[[list], Any] = collate,
) -> DataLoader:
    """Build a loader of training batches, which raises an error after `timeout` seconds without a batch."""
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
