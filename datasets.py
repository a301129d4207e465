"""From a line of a list to a clip: lists, decoding, frame sampling, the datasets. data_loading.py orders and loads.

Lists have a line ``path label`` for each video. Samples are drawn by the key (epoch, index), which together with
the run's seed seeds the one Generator that goes to frame sampling, crop, overlay and mask: a clip is the same
whatever the number of workers or processes, and after a resume. Clips stay uint8 until they are on the device.
"""

import copy
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import decord
import numpy as np
import torch
from torch.utils.data import Dataset
from torch.utils.dlpack import from_dlpack

from masking_generator import MaskGenerator
from object_overlay import ObjectOverlay
from utils import RunError
from video_transforms import TrainAugmentation, long_side_crop, multi_scale_crop, short_side_resize

MAX_BAD_IN_A_ROW = 20
DECORD_CODES = {"-1128613112": "decord has no decoder for this format (AV1?)", "-1381258232": "no video stream"}
Key = tuple[int, int]  # epoch, index


class VideoError(Exception):
    """A video that cannot be used; the message is the reason, without the path."""


# Lists ----------------------------------------------------------------------------------------------------------


class VideoList:
    """Paths and labels of a list file.

    Paths are kept as one array of bytes, which forked loader workers share without copying.

    Args:
        path: text file with ``path label`` a line, separated by the line's last space.
        num_classes: labels must lie in [0, num_classes); None does not look.
        data_root: folder that relative paths start from.
    Raises:
        ValueError: no such file, empty, or a line that is not ``path label``, named by its number.
    """

    def __init__(self, path: str, num_classes: int | None = None, data_root: str = ""):
        if not os.path.isfile(path):
            raise ValueError(f"{path}: no such list file")
        paths, labels, lines = [], [], []
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read as a list, a text file ({str(error)[:80]})") from error
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            name, _, label = line.strip().rpartition(" ")
            if not name or not re.fullmatch(r"-?[0-9]+", label):
                raise ValueError(
                    f"{path}, line {number}: {line.strip()[:80]!r} is not `path label` "
                    "(one space between, the label a whole number)"
                )
            if num_classes is not None and not 0 <= int(label) < num_classes:
                raise ValueError(f"{path}, line {number}: label {label} is not in [0, {num_classes})")
            paths.append(os.fsencode(os.path.join(data_root, name.strip())))
            labels.append(int(label))
            lines.append(number)
        if not paths:
            raise ValueError(f"{path}: the list is empty")
        self.source, self._paths, self.labels, self._lines = path, np.array(paths), np.array(labels), np.array(lines)

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        """Path of a video."""
        return os.fsdecode(self._paths[index])

    def subset(self, indices: np.ndarray) -> "VideoList":
        """The list of these videos alone."""
        part = copy.copy(self)
        part._paths, part.labels, part._lines = self._paths[indices], self.labels[indices], self._lines[indices]
        return part

    def check_files(self, max_bad_fraction: float, look_at: int = 200) -> None:
        """Look for some of the files, evenly over the list, so that a wrong folder shows before anything is computed.

        Raises:
            ValueError: more than this fraction of them is missing.
        """
        looked = np.unique(np.linspace(0, len(self) - 1, look_at).astype(int))
        missing = [index for index in looked if not os.path.isfile(self.path(index))]
        if len(missing) > max_bad_fraction * len(looked):
            raise ValueError(
                f"{self.source}, line {self._lines[missing[0]]}: no such file: {self.path(missing[0])} "
                f"({len(missing)} of {len(looked)} looked for are missing, more than --max_bad_fraction "
                f"{max_bad_fraction}); relative paths start from --data_root"
            )

    def write(self, path: str) -> None:
        """Write it as a list file."""
        Path(path).write_text("".join(f"{self.path(i)} {self.labels[i]}\n" for i in range(len(self))))


def few_shot(videos: VideoList, seed: int, per_class: int = 0, total: int = 0) -> VideoList:
    """A fixed random part of a list: so many videos of each class, or so many in all, in the list's order.

    Raises:
        ValueError: more are asked for than there are.
    """
    order = np.random.default_rng(seed).permutation(len(videos))
    if per_class:
        of_class = [order[videos.labels[order] == label][:per_class] for label in np.unique(videos.labels)]
        short = [int(videos.labels[part[0]]) for part in of_class if len(part) < per_class]
        if short:
            raise ValueError(f"--samples_per_class {per_class}: class {short[0]} of {videos.source} has fewer videos")
        order = np.concatenate(of_class)
    if total > len(order):
        raise ValueError(f"--num_train_videos {total}: {videos.source} has {len(order)}")
    return videos.subset(np.sort(order[:total] if total else order))


# Decoding: the only place that knows decord ---------------------------------------------------------------------


def read_frames(path: str, choose: Callable[[int], np.ndarray]) -> np.ndarray:
    """Decode the frames that `choose` picks, given the number there are.

    Args:
        choose: number of frames → indices ``[T]``, in order; repeated ones are decoded once.
    Returns:
        RGB uint8 ``[T, H, W, 3]``.
    Raises:
        VideoError: missing, unreadable, or without frames.
    """
    if not os.path.isfile(path):
        raise VideoError("no such file")
    try:
        reader = decord.VideoReader(path, num_threads=1)
        if len(reader) == 0:
            raise VideoError("no frames")
        wanted, back = np.unique(choose(len(reader)), return_inverse=True)
        frames = from_dlpack(reader.get_batch(wanted).to_dlpack()).numpy()  # no copy, unlike asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError, TypeError, UnicodeEncodeError) as error:
        raise VideoError(decoder_reason(error, path)) from error
    return frames if len(back) == len(wanted) else frames[back]


def decoder_reason(error: Exception, path: str) -> str:
    """A decoder's error in one line that is the same every time: without clock times, places in its source, path."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    for code, meaning in DECORD_CODES.items():
        line = meaning if f"({code} vs. 0)" in line else line
    return re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: |Check failed: ", "", line).replace(path, "it").strip()[:200]


# Which frames ---------------------------------------------------------------------------------------------------


def pretrain_indices(rng: np.random.Generator, total: int, num_frames: int, stride: int) -> np.ndarray:
    """`num_frames` frames `stride` apart from a random start; a shorter video repeats its last reachable frame."""
    start = rng.integers(0, max(total - num_frames * stride, 0) + 1)
    last = (total - 1 - start) // stride
    return start + stride * np.minimum(np.arange(num_frames), last)


def dense_indices(rng: np.random.Generator | None, total: int, num_frames: int, stride: int) -> np.ndarray:
    """Fine-tuning on Kinetics: a window of ``num_frames * stride`` frames at random (at the centre without `rng`).

    Its frames are spread over the whole window, so a little more than `stride` apart (kept for the released
    models). A video not longer than the window: its frames about `stride` apart, then the last one repeated.
    """
    window = num_frames * stride
    if total <= window:
        spread = np.linspace(0, total, total // stride)
        indices = np.concatenate([spread, np.full(num_frames - len(spread), total)])
        return indices.astype(int).clip(0, total - 1)
    start = rng.integers(0, total - window) if rng else (total - window) // 2
    return np.linspace(start, start + window, num_frames).astype(int).clip(start, start + window - 1)


def segment_indices(rng: np.random.Generator | None, total: int, num_frames: int) -> np.ndarray:
    """Fine-tuning on Something-Something: one random frame (the middle one without `rng`) of each equal segment.

    Fewer frames than segments are spread evenly, with repeats.
    """
    length = total // num_frames
    if length == 0:
        return np.arange(num_frames) * total // num_frames
    inside = rng.integers(0, length, num_frames) if rng else length // 2
    return np.arange(num_frames) * length + inside


def test_view_indices(total: int, num_frames: int, stride: int, views: int, sampling: str) -> np.ndarray:
    """Frames of the temporal views of the multi-view test, ``[views, T]``; a single view is the centre.

    Dense: windows of T out of every `stride`-th frame of the whole video, evenly from its start to its end.
    Segments: frames ``total / T`` apart; the views interleave.
    """
    if sampling == "segments":
        tick = total / num_frames
        phases = np.arange(views) / views if views > 1 else np.array([0.5])
        return (tick * phases[:, None] + tick * np.arange(num_frames)).astype(int)
    every = np.arange(0, total, stride)
    every = np.concatenate([every, np.full(max(0, num_frames - len(every)), every[-1])])
    spare = len(every) - num_frames
    starts = [int(k * (spare / (views - 1))) for k in range(views)] if views > 1 else [spare // 2]
    return np.stack([every[start : start + num_frames] for start in starts])


# Data sets ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """What depends on the data set and so is no flag that could be forgotten."""

    num_classes: int | None
    sampling: str  # dense | segments
    flip: bool
    test_segments: int
    test_crops: int
    train_list: str = "train.csv"


DATA_SETS = {
    "Kinetics-400": DataSet(400, "dense", True, 7, 3),
    "Mini-Kinetics": DataSet(200, "dense", True, 7, 3),
    "SSV2": DataSet(174, "segments", False, 2, 3),
    "SSV2-Mini": DataSet(174, "segments", False, 2, 3, train_list="train_mini.csv"),
    "UCF101": DataSet(101, "dense", True, 5, 3),
    "HMDB51": DataSet(51, "dense", True, 5, 3),
    "custom": DataSet(None, "dense", True, 5, 3),
}


# Samples --------------------------------------------------------------------------------------------------------


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The Generator of one sample."""
    return np.random.default_rng((seed, epoch, index))


class Sample(TypedDict):
    """What a dataset gives for a key; V views of one video."""

    clips: np.ndarray  # uint8 [V, T, H, W, 3]
    extra: np.ndarray  # masks bool [V, N], or labels int [V]
    path: str
    bad: list[tuple[str, str]]  # files that could not be used, and why; the videos among them come first
    num_bad_videos: int
    erase: NotRequired[np.ndarray]  # seeds of random erasing, int64 [V]


class Batch(TypedDict):
    """Samples stacked; B = samples times views."""

    clips: torch.Tensor  # uint8 [B, 3, T, H, W], colour innermost in memory
    extra: torch.Tensor  # bool [B, N], or int64 [B]
    paths: list[str]
    bad: list[tuple[str, str]]
    num_bad_videos: int
    erase: NotRequired[torch.Tensor]  # int64 [B]


def collate(samples: list[Sample]) -> Batch:
    """Stack samples into a batch, views of a video side by side."""
    clips = torch.from_numpy(np.concatenate([sample["clips"] for sample in samples]))
    arrays = [name for name in ("extra", "erase") if name in samples[0]]
    return {
        "clips": clips.permute(0, 4, 1, 2, 3),
        **{name: torch.from_numpy(np.concatenate([sample[name] for sample in samples])) for name in arrays},
        "paths": [sample["path"] for sample in samples],
        "bad": [entry for sample in samples for entry in sample["bad"]],
        "num_bad_videos": sum(sample["num_bad_videos"] for sample in samples),
    }


def read_or_replace(
    rng: np.random.Generator, videos: VideoList, index: int, choose: Callable[[int], np.ndarray]
) -> tuple[np.ndarray, int, list[tuple[str, str]]]:
    """Frames of a video for training; one that cannot be read is replaced by another, drawn from `rng`.

    Returns:
        frames uint8 ``[T, H, W, 3]``, the index they come from, and the bad (path, reason) pairs on the way.
    Raises:
        RunError: MAX_BAD_IN_A_ROW in a row.
    """
    bad = []
    while len(bad) < MAX_BAD_IN_A_ROW:
        try:
            return read_frames(videos.path(index), choose), index, bad
        except VideoError as error:
            bad.append((videos.path(index), str(error)))
            index = int(rng.integers(len(videos)))
    first = "; ".join(f"{path}: {reason}" for path, reason in bad[:3])
    raise RunError(f"{videos.source}: {len(bad)} videos in a row could not be read, the first: {first}")


class PretrainDataset(Dataset):
    """Clips with masks: decode, crop, overlay, mask.

    Args:
        size: (width, height) of the clips, pixels.
        overlay: pastes objects (stage 1); None leaves clips as they are.
        num_views: independent crops, overlays and masks of each decoded window (--num_sample).
    """

    def __init__(
        self,
        videos: VideoList,
        masks: MaskGenerator,
        overlay: ObjectOverlay | None,
        size: tuple[int, int],
        num_frames: int = 16,
        stride: int = 4,
        num_views: int = 1,
        seed: int = 0,
    ):
        self.videos, self.masks, self.overlay, self.size = videos, masks, overlay, size
        self.num_frames, self.stride, self.num_views, self.seed = num_frames, stride, num_views, seed

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: Key) -> Sample:
        rng = sample_rng(self.seed, *key)
        choose = lambda total: pretrain_indices(rng, total, self.num_frames, self.stride)
        frames, index, bad = read_or_replace(rng, self.videos, key[1], choose)
        views = [self.view(rng, frames) for _ in range(self.num_views)]
        num_bad_videos = len(bad)
        if self.overlay and self.overlay.library:
            bad += self.overlay.library.take_skipped()
        return {
            "clips": np.stack([clip for clip, _ in views]),
            "extra": np.stack([mask for _, mask in views]),
            "path": self.videos.path(index),
            "bad": bad,
            "num_bad_videos": num_bad_videos,
        }

    def view(self, rng: np.random.Generator, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One training clip uint8 ``[T, H, W, 3]`` and its mask bool ``[N]`` from decoded frames."""
        clip = multi_scale_crop(rng, frames, self.size)
        try:
            boxes = self.overlay(rng, clip) if self.overlay else None
        except RuntimeError as error:  # no usable object; not to be taken for a failed worker
            raise RunError(str(error)) from error
        return clip, self.masks(rng, boxes)


class FinetuneDataset(Dataset):
    """Labelled training clips: decode, augment.

    Args:
        sampling: ``dense`` (frames `stride` apart) or ``segments``.
        num_views: augmentations of each decoded clip (repeated augmentation, --num_sample).
    """

    def __init__(
        self,
        videos: VideoList,
        augment: TrainAugmentation,
        sampling: str,
        num_frames: int = 16,
        stride: int = 4,
        num_views: int = 1,
        seed: int = 0,
    ):
        self.videos, self.augment, self.sampling = videos, augment, sampling
        self.num_frames, self.stride, self.num_views, self.seed = num_frames, stride, num_views, seed

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: Key) -> Sample:
        rng = sample_rng(self.seed, *key)

        def choose(total: int) -> np.ndarray:
            if self.sampling == "segments":
                return segment_indices(rng, total, self.num_frames)
            return dense_indices(rng, total, self.num_frames, self.stride)

        frames, index, bad = read_or_replace(rng, self.videos, key[1], choose)
        clips = np.stack([self.augment(rng, frames) for _ in range(self.num_views)])
        return {
            "clips": clips,
            "extra": np.full(self.num_views, self.videos.labels[index]),
            "erase": rng.integers(2**32, size=self.num_views),
            "path": self.videos.path(index),
            "bad": bad,
            "num_bad_videos": len(bad),
        }


class EvalSample(TypedDict):
    """A video of a validation or test list, with all its views."""

    index: int
    views: torch.Tensor  # uint8 [V, 3, T, H, W]
    error: str  # why it could not be read; then `views` is empty


@dataclass(frozen=True)
class ViewReader:
    """Reads all views of a video, decoding it once; nothing is random.

    Args:
        sampling: ``dense`` or ``segments``.
        segments, crops: views in time and space; segments 0 is validation: the centre of training's sampling.
        size: side of the views, pixels.
    """

    sampling: str
    segments: int
    crops: int
    size: int
    num_frames: int = 16
    stride: int = 4

    def frame_indices(self, total: int) -> np.ndarray:
        """Frames of each temporal view, ``[segments, T]``."""
        if self.segments:
            return test_view_indices(total, self.num_frames, self.stride, self.segments, self.sampling)
        if self.sampling == "segments":
            return segment_indices(None, total, self.num_frames)[None]
        return dense_indices(None, total, self.num_frames, self.stride)[None]

    def __call__(self, path: str) -> torch.Tensor:
        """uint8 ``[segments * crops, 3, T, size, size]``, the crops of a segment side by side.

        Raises:
            VideoError: unreadable.
        """
        views: list[np.ndarray] = []

        def choose(total: int) -> np.ndarray:
            views.append(self.frame_indices(total))
            return np.unique(views[0])

        frames = short_side_resize(read_frames(path, choose), self.size)
        where = np.searchsorted(np.unique(views[0]), views[0])  # [segments, T]
        squares = [long_side_crop(frames, self.size, crop, self.crops) for crop in range(self.crops)]
        clips = np.stack([square[window] for window in where for square in squares])
        return torch.from_numpy(clips).permute(0, 4, 1, 2, 3)


class EvalDataset(Dataset):
    """Videos to be judged, each with all its views."""

    def __init__(self, videos: VideoList, read_views: ViewReader):
        self.videos, self.read_views = videos, read_views

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> EvalSample:
        try:
            return {"index": index, "views": self.read_views(self.videos.path(index)), "error": ""}
        except VideoError as error:
            return {"index": index, "views": torch.empty(0, dtype=torch.uint8), "error": str(error)}
