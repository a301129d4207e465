"""Labels, and metrics of scores: accuracy, or average precision where videos have several labels.

Task holds everything that differs between single-label and multi-label data sets.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from lists import VideoList
from utils import RunError
from video_reader import Clip, Span

MAX_LABEL = 2**31 - 1
SEVERAL = "classes such as `0,2`, or with their seconds `92:11.90-21.20,147:0.00-12.60`, or `-` for none"
ACTION = re.compile(r"(\d+)(?::(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?))?", re.ASCII)


@dataclass(frozen=True)
class VideoScore:
    """The output of a model for the views of a video.

    Attributes:
        index: of the video's line in the list.
        views: ``[V, C]``, or ``[V, P, C]`` of P probes; no rows if the video could not be read.
        error: why it could not be read.
        spans: the time that each view covers.
    """

    index: int
    views: np.ndarray
    error: str = ""
    spans: Sequence[Span] = ()

    def of_probe(self, p: int) -> "VideoScore":
        """Return the scores that probe `p` gives."""
        return self if self.error else VideoScore(self.index, self.views[:, p])


def combine_views(scores: list[VideoScore], num_classes: int, how: str = "mean") -> np.ndarray:
    """Combine the views of each video by mean or max (`how`), float64 ``[n, C]``; NaN without views."""
    combined, combine = np.full((len(scores), num_classes), np.nan), np.max if how == "max" else np.mean
    for row, score in zip(combined, scores):
        if len(score.views):
            row[:] = combine(score.views.astype(np.float64), axis=0)
    return combined


def in_top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Return whether each label is among its video's k highest scores, bool ``[n]``; False for NaN.

    Of equal scores the class with the lower number comes first, so that a constant answer is not right.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    earlier = (scores == own) & (np.arange(scores.shape[1]) < labels[:, None])
    return ((scores > own) | earlier).sum(axis=1) < np.where(np.isnan(own[:, 0]), 0, k)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute top-1 and top-5 in percent, over videos and as the mean over the classes that occur."""
    metrics = {}
    for k in (1, 5):
        right = in_top_k(scores, labels, k)
        metrics[f"acc{k}"] = 100.0 * right.mean()
        metrics[f"class_acc{k}"] = 100.0 * np.mean([right[labels == label].mean() for label in np.unique(labels)])
    return {name: float(value) for name, value in metrics.items()}


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Compute the average precision; tied scores form one step.

    Args:
        scores: ``[n]``; NaN comes after all others.
        positive: bool ``[n]``, at least one of them.
    """
    scores = np.where(np.isnan(scores), np.nanmin(scores, initial=0) - 1, scores)
    order = np.argsort(-scores)
    hits = np.cumsum(positive[order])
    steps = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last of equal scores
    return float((np.diff(hits[steps], prepend=0) * hits[steps] / (steps + 1)).sum() / hits[-1])


# Labels ---------------------------------------------------------------------------------------------------------


def class_label(text: str, num_classes: int = 0) -> int:
    """Parse a class number.

    Raises:
        ValueError: not a number, or not in [0, num_classes) if this is not 0.
    """
    if not re.fullmatch(r"-?[0-9]+", text):
        hint = (
            "; videos with several labels need --data_set Charades or custom"
            if re.fullmatch(r"[\d,:.-]*[,:][\d,:.-]*", text)
            else ""
        )
        raise ValueError(f"label {text!r} is not a whole number{hint}")
    number = int(text)
    if abs(number) > MAX_LABEL or (num_classes and not 0 <= number < num_classes):
        raise ValueError(f"label {text} is not in [0, {num_classes or MAX_LABEL})")
    return number


def read_actions(text: str, num_classes: int = 0) -> np.ndarray:
    """Parse the labels of a video: class, first and last second of each, float64 ``[A, 3]``; ±inf if no seconds.

    Raises:
        ValueError: not SEVERAL, a class not in [0, num_classes), or seconds that end before they start.
    """
    actions = []
    for action in [] if text == "-" else text.split(","):
        parsed = ACTION.fullmatch(action)
        if not parsed:
            raise ValueError(f"label {text[:80]!r} is not {SEVERAL}")
        start, end = (float(parsed[2]), float(parsed[3])) if parsed[2] else (-np.inf, np.inf)
        if start > end:
            raise ValueError(f"{action} ends before it starts")
        actions.append((class_label(parsed[1], num_classes), start, end))
    return np.array(actions, dtype=np.float64).reshape(-1, 3)


def label_classes(text: str) -> set[int]:
    """Return the classes in a label of either form; empty if it is not a label."""
    try:
        return set(read_actions(text)[:, 0].astype(int).tolist())
    except ValueError:
        return set()


@dataclass(frozen=True)
class Task:
    """Single-label task: softmax, cross-entropy, accuracy; MultiLabelTask overrides it.

    Args:
        combine: mean | max: how the scores of a video's views become one.
        num_classes: labels of lists must lie in [0, num_classes); 0: labels are not checked.
        names: of the classes, if known, for tables and predictions.
    """

    combine: str = "mean"
    num_classes: int = 0
    names: Sequence[str] | None = None
    metric: ClassVar[str] = "acc1"  # picks the best weights
    shown: ClassVar[tuple[str, ...]] = ("acc1", "acc5")
    no_label: ClassVar[int | bytes] = -1  # what stands for none in VideoList.labels

    def parse_label(self, text: str) -> int | str:
        """Convert a label of a list for VideoList.labels.

        Raises:
            ValueError: not a label.
        """
        return class_label(text, self.num_classes)

    def parse_test_label(self, text: str) -> int | str | bytes:
        """Convert a label of a test list, where -1 stands for no label."""
        return self.no_label if text == "-1" else self.parse_label(text)

    def unlabelled(self, videos: VideoList) -> bool:
        """Return whether a test list has no labels.

        Raises:
            ValueError: some of its videos have one, others have none.
        """
        lacking = np.flatnonzero(videos.labels == self.no_label)
        if 0 < len(lacking) < len(videos):
            remedy = f"label them, or give the list to --predict, which needs no labels: --predict {videos.source}"
            raise ValueError(
                f"{videos.where(lacking[0])}: label -1 (none), as {len(lacking)} of {len(videos)} videos: {remedy}"
            )
        return len(lacking) > 0

    def clip_label(self, videos: VideoList, index: int, clip: Clip) -> Any:
        """Return the label of a training clip: that of its video."""
        return np.int64(videos.labels[index])

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """Convert VideoList.labels for `losses` and `measure`."""
        return labels.astype(np.int64)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits ``[..., C]`` → probabilities."""
        return logits.softmax(dim=-1)

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of each clip ``[B]``, from logits ``[B, C]`` and `targets`."""
        return F.cross_entropy(logits, labels, reduction="none")

    def train_metrics(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute what is logged beside the loss, from logits ``[B, C]``, or ``[B, P, C]`` of P probes."""
        right = logits.argmax(dim=-1).movedim(0, -1) == labels  # [B], or [P, B]; mixed clips count by their own label
        return {"acc1": right.float().mean() * 100}

    def measure(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Compute metrics in percent from scores ``[n, C]``; NaN where a video could not be read."""
        return accuracy(scores, labels)

    def class_table(self, scores: np.ndarray, labels: np.ndarray) -> tuple[list[str], dict[int, list]]:
        """Return column names, and for each class that occurs its number of videos and metrics in percent."""
        right = {k: in_top_k(scores, labels, k) for k in (1, 5)}
        rows = {
            int(label): [(labels == label).sum(), *(100 * right[k][labels == label].mean() for k in (1, 5))]
            for label in np.unique(labels)
        }
        return ["videos", "top1", "top5"], rows


@dataclass(frozen=True)
class MultiLabelTask(Task):
    """Multi-label task, labels ``[n, C]`` of 0 and 1: sigmoid, binary cross-entropy, mAP."""

    needs_seconds: bool = False  # of each label of a list
    metric: ClassVar[str] = "map"
    shown: ClassVar[tuple[str, ...]] = ("map",)
    no_label: ClassVar[int | bytes] = b"-1"

    def parse_label(self, text: str) -> int | str:
        """Check a label with read_actions, and keep its text."""
        actions = read_actions(text, self.num_classes)
        if self.needs_seconds and np.isinf(actions).any():
            raise ValueError(f"label {text[:80]!r} has no seconds, as in `92:11.90-21.20,147:0.00-12.60`")
        return text

    def clip_label(self, videos: VideoList, index: int, clip: Clip) -> np.ndarray:
        """Return the multi-hot label of the classes from the first to the last frame of a clip, float32 ``[C]``.

        Raises:
            RunError: labels have seconds, and the video has neither timestamps nor a frame rate.
        """
        actions = read_actions(os.fsdecode(videos.labels[index]))
        if np.isinf(actions[:, 1]).all():
            return self.seen(actions)
        if not np.isfinite(clip.seconds).all():
            remedy = "scripts/data/resize_videos.py writes them"
            raise RunError(f"{videos.path(index)} has no timestamps, which labels in seconds need; {remedy}")
        return self.seen(actions, clip.seconds[0], clip.seconds[-1])

    def seen(self, actions: np.ndarray, start: float = -np.inf, end: float = np.inf) -> np.ndarray:
        """Return the multi-hot label of the actions ``[A, 3]`` that overlap `start` to `end`, float32 ``[C]``."""
        label = np.zeros(self.num_classes, np.float32)
        label[actions[(actions[:, 1] <= end) & (actions[:, 2] >= start), 0].astype(int)] = 1
        return label

    def targets(self, labels: np.ndarray) -> np.ndarray:
        return np.stack([self.seen(read_actions(os.fsdecode(label))) for label in labels])

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=-1)

    def train_metrics(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

    def measure(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Compute the mean average precision over the classes that occur, and their number."""
        of_classes = [values[-1] for values in self.class_table(scores, labels)[1].values()]
        return {"map": float(np.mean(of_classes)) if of_classes else 0.0, "classes": len(of_classes)}

    def class_table(self, scores: np.ndarray, labels: np.ndarray) -> tuple[list[str], dict[int, list]]:
        positive = labels > 0
        rows = {
            int(label): [positive[:, label].sum(), 100 * average_precision(scores[:, label], positive[:, label])]
            for label in np.flatnonzero(positive.any(axis=0))
        }
        return ["videos", "ap"], rows
