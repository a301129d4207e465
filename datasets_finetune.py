"""Labelled data sets: their table, their lists, and which frames training, validation and test see of a video.

DATA_SETS holds what depends on the data set, so that no flag has to be remembered. Lists are read in lists.py, frames
in video_reader.py.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch

from datasets import Key, Sample, VideoDataset, VideoStream, read_or_replace, sample_rng
from lists import VideoList, read_lines, read_list, read_text
from metrics import MultiLabelTask
from video_reader import Clip, InexactError, Span, VideoError, open_video, read_clip
from video_transforms_finetune import TrainAugmentation, long_side_crop, short_side_resize

SEVERE_SEED = 99999
SAMPLINGS = ("dense", "segments")  # frames `stride` apart, or one of each equal segment
FEW_VIEWS = 16  # in time; as many are kept in memory until all of them are read

# Data sets ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """Settings that depend on the data set; they are not command-line options.

    Args:
        num_classes: None if the user gives it.
        flip: mirror half of the training clips; False where classes depend on left and right.
        test_segments, test_crops: views of the test, in time and in space.
        multi_label: videos have several classes, each with its seconds. Those of `custom` may, although it is False.
        combine: mean | max: how the test combines the scores of the views.
        ending: suffix of list names in place of ``.csv``, in a folder that has such lists.
        train_videos: length of the list that SEVERE draws a subset from; 0: SEVERE draws none.
    """

    num_classes: int | None
    sampling: str  # one of SAMPLINGS
    flip: bool
    test_segments: int
    test_crops: int
    multi_label: bool = False
    combine: str = "mean"
    train_list: str = "train.csv"
    ending: str = ".csv"
    train_videos: int = 0

    def __post_init__(self):
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling {self.sampling!r}: choose from {SAMPLINGS}")

    def list_path(self, folder: str, name: str) -> str:
        """Return the path of the list `name`, such as ``val.csv``, in a folder."""
        if any(Path(folder).glob(f"*{self.ending}")):
            name = name.removesuffix(".csv") + self.ending
        return str(Path(folder, name))


DATA_SETS = {  # classes, sampling, flip, views in time, views in space
    "Kinetics-400": DataSet(400, "dense", True, 7, 3),
    "Mini-Kinetics": DataSet(200, "dense", True, 7, 3, ending="_mini_kinetics.csv"),
    "SSV2": DataSet(174, "segments", False, 2, 3),
    "SSV2-Mini": DataSet(174, "segments", False, 2, 3, train_list="train_mini.csv"),
    "UCF101": DataSet(101, "dense", True, 5, 3, train_videos=9537),
    "HMDB51": DataSet(51, "dense", True, 5, 3),
    "Gym99": DataSet(99, "dense", True, 5, 3, train_videos=20484),
    "Gym288": DataSet(288, "dense", True, 5, 3),
    "FX-S1": DataSet(11, "dense", True, 5, 3),
    "UB-S1": DataSet(15, "dense", True, 5, 3),
    "Diving48": DataSet(48, "dense", True, 5, 3),
    "NTU60": DataSet(60, "dense", True, 5, 3),
    "Charades": DataSet(157, "dense", True, 10, 3, multi_label=True, combine="max"),
    "EPIC-verbs": DataSet(97, "dense", True, 5, 3),
    "custom": DataSet(None, "dense", True, 5, 3),
    "custom-unmirrored": DataSet(None, "dense", False, 5, 3),  # where left and right are labels
}


# Lists ----------------------------------------------------------------------------------------------------------


def find_multi_label(paths: list[str]) -> str:
    """Return the place of the first line of these lists whose label has the multi-label form; '' if there is none."""
    for path in filter(os.path.isfile, paths):
        try:
            for numbers, _, labels in read_lines(path):
                for number, label in zip(numbers, labels):
                    if b"," in label or b":" in label or label == b"-":
                        return f"{path}, line {number}: {os.fsdecode(label)[:80]}"
        except ValueError:  # read_list reports it
            continue
    return ""


class ActionList:
    """A list with labels in seconds, as Charades has them, for scripts that label clips themselves."""

    def __init__(self, path: str, num_classes: int, data_root: str = ""):
        self.task = MultiLabelTask(num_classes=num_classes, needs_seconds=True)
        self.videos = read_list(path, self.task.parse_label, data_root)

    def clip_label(self, index: int, clip: Clip) -> np.ndarray:
        """See MultiLabelTask.clip_label."""
        return self.task.clip_label(self.videos, index, clip)


def severe_subset(videos: VideoList, examples: int, num_classes: int) -> VideoList:
    """Draw the videos that the SEVERE benchmark trains its low-shot cells on, in SEVERE's order.

    Draws k = ceil(examples / num_classes) videos of each class, class by class without replacement from one
    RandomState(99999), or takes the whole class if it has no more. So 1000 gives 1,010 videos of UCF101 and 1,089 of
    Gym-99. The draw depends on the whole list.
    """
    rng, k = np.random.RandomState(SEVERE_SEED), -(-examples // num_classes)
    drawn = []
    for label in np.unique(videos.labels):
        of_class = np.flatnonzero(videos.labels == label)
        drawn.append(of_class[rng.choice(len(of_class), k, replace=False)] if len(of_class) > k else of_class)
    return videos.subset(np.concatenate(drawn))


def few_shot(videos: VideoList, seed: int, samples_per_class: int = 0, num_train_videos: int = 0) -> VideoList:
    """Draw a fixed random part of a list, by class or in all, kept in the list's order.

    Raises:
        ValueError: there are fewer videos.
    """
    order = np.random.default_rng(seed).permutation(len(videos))
    if samples_per_class:
        of_class = [order[videos.labels[order] == label][:samples_per_class] for label in np.unique(videos.labels)]
        if short := [videos.labels[part[0]] for part in of_class if len(part) < samples_per_class]:
            raise ValueError(
                f"samples_per_class {samples_per_class}: class {short[0]} of {videos.source} has fewer videos"
            )
        order = np.concatenate(of_class)
    if num_train_videos > len(order):
        raise ValueError(f"num_train_videos {num_train_videos}: {videos.source} has {len(order)}")
    return videos.subset(np.sort(order[:num_train_videos] if num_train_videos else order))


def read_class_names(folder: str, num_classes: int) -> list[str] | None:
    """Read ``classes.txt`` in a data set's folder; None if there is none.

    Raises:
        ValueError: another number of lines than classes.
    """
    file = Path(folder) / "classes.txt"
    if not file.is_file():
        return None
    names = read_text(file).rstrip().splitlines()
    if len(names) != num_classes:
        raise ValueError(f"{file} has {len(names)} lines, but there are {num_classes} classes")
    return names


# Which frames ---------------------------------------------------------------------------------------------------


def dense_indices(rng: np.random.Generator | None, total: int, num_frames: int, stride: int) -> np.ndarray:
    """Choose frames ``[T]`` of a random window (without `rng` the centre) of ``num_frames * stride``, as on Kinetics.

    They are spread over the whole window, so a little more than `stride` apart (kept for the released models). A video
    not longer than the window: its frames about `stride` apart, then the last one repeated.
    """
    window = num_frames * stride
    if total <= window:
        spread = np.linspace(0, total, total // stride)
        indices = np.concatenate([spread, np.full(num_frames - len(spread), total)])
        return indices.astype(int).clip(0, total - 1)
    start = rng.integers(0, total - window) if rng else (total - window) // 2
    return np.linspace(start, start + window, num_frames).astype(int).clip(start, start + window - 1)


def segment_indices(rng: np.random.Generator | None, total: int, num_frames: int) -> np.ndarray:
    """Choose a random frame (without `rng` the middle one) of each of T equal segments, as on Something-Something.

    Fewer frames than segments are spread evenly, with repeats.
    """
    length = total // num_frames
    if length == 0:
        return np.arange(num_frames) * total // num_frames
    inside = rng.integers(0, length, num_frames) if rng else length // 2
    return np.arange(num_frames) * length + inside


def clip_indices(
    rng: np.random.Generator | None, total: int, num_frames: int, stride: int, sampling: str
) -> np.ndarray:
    """Choose frames of a training clip, or without `rng` of a validation clip: sorted int ``[T]`` in [0, total).

    Raises:
        ValueError: `sampling` is none of SAMPLINGS.
    """
    if sampling == "segments":
        return segment_indices(rng, total, num_frames)
    if sampling == "dense":
        return dense_indices(rng, total, num_frames, stride)
    raise ValueError(f"sampling {sampling!r}: choose from {SAMPLINGS}")


def test_view_indices(total: int, num_frames: int, stride: int, views: int, sampling: str) -> np.ndarray:
    """Choose frames of the temporal views of the multi-view test, ``[views, T]``; a single view is the centre.

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


# Samples --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class FinetuneDataset(VideoDataset):
    """Labelled training clips: decode, augment.

    Args:
        clip_label: (list, index of a video, clip of it) → the clip's label; see metrics.Task.clip_label.
        sampling: one of SAMPLINGS.
        num_views: augmentations of each decoded clip (repeated augmentation).
    """

    videos: VideoList
    clip_label: Callable[[VideoList, int, Clip], Any]
    augment: TrainAugmentation
    sampling: str
    num_frames: int = 16
    stride: int = 4
    num_views: int = 1
    seed: int = 0
    reader: str = "pyav"

    def __getitem__(self, key: Key) -> Sample:
        rng = sample_rng(self.seed, *key)
        choose = lambda total: clip_indices(rng, total, self.num_frames, self.stride, self.sampling)
        found, index, bad = read_or_replace(rng, self.videos, key[1], lambda path: read_clip(path, choose, self.reader))
        clips = np.stack([self.augment(rng, found.frames) for _ in range(self.num_views)])
        labels = np.stack([self.clip_label(self.videos, index, found)] * self.num_views)
        seeds, path = rng.integers(2**32, size=self.num_views), self.videos.path(index)
        return {"clips": clips, "labels": labels, "erase": seeds, "path": path, "bad": bad, "num_bad_videos": len(bad)}


@dataclass(frozen=True)
class ViewReader:
    """Reads the views of a video one after the other, decoding it once; nothing is random.

    Args:
        sampling: one of SAMPLINGS.
        segments, crops: views in time and space; segments 0 is validation: the centre of training's sampling.
        size: side of the views, pixels.
        short_side: short side of the frame before cropping, at least `size`; 0: `size`.
    """

    sampling: str
    segments: int
    crops: int
    size: int
    num_frames: int = 16
    stride: int = 4
    short_side: int = 0
    reader: str = "pyav"

    def frame_indices(self, seconds: np.ndarray) -> np.ndarray:
        """Choose frames ``[V, T]`` of each temporal view of a video whose frames are shown at `seconds` ``[total]``."""
        total = len(seconds)
        if self.segments:
            return test_view_indices(total, self.num_frames, self.stride, self.segments, self.sampling)
        return clip_indices(None, total, self.num_frames, self.stride, self.sampling)[None]

    def squares(self, frame: np.ndarray) -> np.ndarray:
        """Crop a frame ``[H, W, 3]``, uint8 ``[crops, size, size, 3]``."""
        small = short_side_resize(frame[None], self.short_side or self.size)
        return np.concatenate([long_side_crop(small, self.size, crop, self.crops) for crop in range(self.crops)])

    def views(self, path: str) -> Iterator[tuple[np.ndarray, Span]]:
        """Yield the temporal views of a video: crops uint8 ``[crops, T, size, size, 3]``, and when they are shown.

        Raises:
            VideoError: unreadable.
        """
        given, views = 0, self.views_of(path, in_order=False)
        try:
            if 0 < self.segments <= FEW_VIEWS:  # all or none, as a later one may fail
                views = iter(list(views))
            for view in views:
                given += 1
                yield view
        except InexactError:
            if given:
                raise
            yield from self.views_of(path, in_order=True)

    def views_of(self, path: str, in_order: bool) -> Iterator[tuple[np.ndarray, Span]]:
        """See views. Frames are cropped as they are decoded, and kept as long as a view needs them."""
        with open_video(path, self.reader, in_order) as video:
            views = self.frame_indices(video.seconds)
            last_view = {index: number for number, view in enumerate(views.tolist()) for index in view}
            wanted, kept, done = np.unique(views), dict[int, np.ndarray](), 0
            for index, frame in zip(wanted.tolist(), video.frames(wanted)):
                kept[index] = self.squares(frame)
                while done < len(views) and views[done].max() <= index:
                    clips = np.stack([kept[needed] for needed in views[done].tolist()], axis=1)
                    yield clips, self.span(video.seconds, views[done])
                    done += 1
                    kept = {needed: squares for needed, squares in kept.items() if last_view[needed] >= done}

    def span(self, seconds: np.ndarray, frames: np.ndarray) -> Span:
        """Return the span of a view of frames ``[T]``: to the frame `stride` after its last one, or the video's end."""
        total, after, length = len(seconds), int(frames[-1]) + self.stride, float(seconds[-1] - seconds[0])
        rate = (total - 1) / length if length > 0 else float("nan")
        end = float(seconds[after]) if after < total else float(seconds[-1]) + (1 / rate if rate > 0 else 0.0)
        return Span(float(seconds[frames[0]]), end, rate, total)

    def __call__(self, path: str) -> torch.Tensor:
        """Read all views, uint8 ``[V * crops, 3, T, size, size]``, crops of a view side by side; raises VideoError."""
        return as_views([clip for clips, _ in self.views(path) for clip in clips])


@dataclass(frozen=True)
class WindowReader(ViewReader):
    """Reads windows of ``num_frames * stride`` frames from the start of a video to its end.

    Windows that do not fit are left out; a shorter video gives one, which repeats the last frame.

    Args:
        every: distance of two windows, in frames or seconds.
        in_seconds: window k begins with the frame shown at second k * `every`.
    """

    every: float = 16
    in_seconds: bool = False

    def frame_indices(self, seconds: np.ndarray) -> np.ndarray:
        total = len(seconds)
        starts = np.arange(max(total - self.num_frames * self.stride, 0) + 1)
        if self.in_seconds:
            if not np.isfinite(seconds).all():
                raise VideoError("its frames have no times, which windows in seconds need")
            moments = seconds[0] + self.every * np.arange(int((seconds[-1] - seconds[0]) / self.every) + 1)
            shown = np.searchsorted(seconds, moments + 1e-6, side="right") - 1  # stamps are rounded
            starts = shown[shown <= starts[-1]]
        else:
            starts = starts[:: int(self.every)]
        return (starts[:, None] + self.stride * np.arange(self.num_frames)).clip(max=total - 1)


def as_views(clips: list[np.ndarray]) -> torch.Tensor:
    """Stack clips uint8 ``[T, H, W, 3]`` to ``[V, 3, T, H, W]``, memory format channels_last_3d."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)


class EvalSample(TypedDict):
    """Some views of a video; the parts of a video come one after the other."""

    index: int
    views: torch.Tensor  # uint8 [V, 3, T, H, W]
    spans: list[Span]  # of each view
    error: str  # why the video could not be read; then there are no views
    last: bool  # nothing of this video follows


class EvalDataset(VideoStream):
    """All views of the videos of a list, at most `part` of them in a sample."""

    def __init__(self, videos: VideoList, mine: Sequence[int], read_views: ViewReader, part: int):
        super().__init__(videos, mine)
        self.read_views, self.part = read_views, part

    def samples(self, index: int) -> Iterator[EvalSample]:
        clips: list[np.ndarray] = []
        spans: list[Span] = []
        error = ""
        try:
            for crops, span in self.read_views.views(self.videos.path(index)):
                for clip in crops:
                    if len(clips) == self.part:
                        yield {"index": index, "views": as_views(clips), "spans": spans, "error": "", "last": False}
                        clips, spans = [], []
                    clips.append(clip)
                    spans.append(span)
        except VideoError as unreadable:
            clips, spans, error = [], [], str(unreadable)
        views = as_views(clips) if clips else torch.empty(0, dtype=torch.uint8)
        yield {"index": index, "views": views, "spans": spans, "error": error, "last": True}
