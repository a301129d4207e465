"""From the scores of views to numbers: gathering over processes, accuracy or average precision, and a test's files.

A video is its line in the list. One that could not be read counts as wrong and is named. Task holds everything that
differs where videos have several labels.
"""

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lists import VideoList
from utils import RunError, broadcast, cpu_group, rank, warn_once, world_size
from video_reader import Clip, Span

TOP = 5  # classes of each video in predictions.csv
MAX_LABEL = 2**31 - 1
SEVERAL = "classes such as `0,2`, or with their seconds `92:11.90-21.20,147:0.00-12.60`, or `-` for none"
ACTION = re.compile(r"(\d+)(?::(\d+(?:\.\d+)?)-(\d+(?:\.\d+)?))?", re.ASCII)


@dataclass(frozen=True)
class VideoScore:
    """The output of a model for a video: its line in the list and class probabilities of its views.

    `views` is ``[V, C]``, or ``[V, P, C]`` from P probes; without rows if the video could not be read. `spans`: when
    each view is shown.
    """

    index: int
    views: np.ndarray
    error: str = ""
    spans: Sequence[Span] = ()

    def of_probe(self, p: int) -> "VideoScore":
        """The scores that probe `p` gives."""
        return self if self.error else VideoScore(self.index, self.views[:, p])


def gather_scores(scores: list[VideoScore], everywhere: bool = False) -> list[VideoScore]:
    """The scores of all processes by line of the list, in the first process or `everywhere`; else none."""
    parts: list[list[VideoScore]] = [scores]
    if world_size() > 1:
        parts = [[] for _ in range(world_size())]
        if everywhere:
            dist.all_gather_object(parts, scores, group=cpu_group())
        else:
            dist.gather_object(scores, parts if rank() == 0 else None, dst=0, group=cpu_group())
    return sorted((score for part in parts for score in part), key=lambda score: score.index)


def combine_views(scores: list[VideoScore], num_classes: int, how: str = "mean") -> np.ndarray:
    """Mean, or with `how` max the highest, over the views of each video, float64 ``[n, C]``; NaN without views."""
    unread, combine = np.full(num_classes, np.nan), np.max if how == "max" else np.mean
    return np.stack(
        [combine(score.views.astype(np.float64), axis=0) if len(score.views) else unread for score in scores]
    )


def in_top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Whether each label is among its video's k highest scores, bool ``[n]``; False for NaN.

    Of equal scores the class with the lower number comes first, so that a constant answer is not right.
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    earlier = (scores == own) & (np.arange(scores.shape[1]) < labels[:, None])
    return ((scores > own) | earlier).sum(axis=1) < np.where(np.isnan(own[:, 0]), 0, k)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1 and top-5 in percent, over videos and as the mean over the classes that occur.

    Args:
        scores: ``[n, C]``; labels: int ``[n]``.
    """
    metrics = {}
    for k in (1, 5):
        right = in_top_k(scores, labels, k)
        metrics[f"acc{k}"] = 100.0 * right.mean()
        metrics[f"class_acc{k}"] = 100.0 * np.mean([right[labels == label].mean() for label in np.unique(labels)])
    return {name: float(value) for name, value in metrics.items()}


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Average precision; tied scores form one step.

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
    """A class number.

    Raises:
        ValueError: it is none, or not in [0, num_classes); 0: any number is taken.
    """
    if not re.fullmatch(r"-?[0-9]+", text):
        hint = "; several labels a video need --data_set Charades or custom" if re.fullmatch(r"[\d,:.-]+", text) else ""
        raise ValueError(f"label {text!r} is not a whole number{hint}")
    number = int(text)
    if abs(number) > MAX_LABEL or (num_classes and not 0 <= number < num_classes):
        raise ValueError(f"label {text} is not in [0, {num_classes or MAX_LABEL})")
    return number


def read_actions(text: str, num_classes: int = 0) -> np.ndarray:
    """Class, first and last second of each label of a video, float64 ``[A, 3]``; the whole video where none are given.

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
    """The classes that a label names, in whatever form; none if it is no label."""
    try:
        return set(read_actions(text)[:, 0].astype(int).tolist())
    except ValueError:
        return set()


@dataclass(frozen=True)
class Task:
    """Single-label task: softmax, cross-entropy, accuracy; SeveralLabels overrides it.

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
        """A label of a list, as VideoList.labels keeps it.

        Raises:
            ValueError: it is none.
        """
        return class_label(text, self.num_classes)

    def parse_test_label(self, text: str) -> int | str | bytes:
        """The same of a test list, where -1 stands for no label."""
        return self.no_label if text == "-1" else self.parse_label(text)

    def unlabelled(self, videos: VideoList) -> bool:
        """Whether a test list has no labels.

        Raises:
            ValueError: some of its videos have one and some have not.
        """
        lacking = np.flatnonzero(videos.labels == self.no_label)
        if 0 < len(lacking) < len(videos):
            remedy = f"label them, or give the list to --predict, which needs no labels: --predict {videos.source}"
            raise ValueError(
                f"{videos.where(lacking[0])}: label -1 (none), as {len(lacking)} of {len(videos)} videos: {remedy}"
            )
        return len(lacking) > 0

    def clip_label(self, videos: VideoList, index: int, clip: Clip) -> Any:
        """The label of a clip of a video, for training: the video's own."""
        return np.int64(videos.labels[index])

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """Labels of whole videos as `losses` and `measure` take them."""
        return labels.astype(np.int64)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of the classes, ``[..., C]``."""
        return logits.softmax(dim=-1)

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Of each clip ``[B]``, from logits ``[B, C]`` and labels as lists have them."""
        return F.cross_entropy(logits, labels, reduction="none")

    def while_training(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the log shows beside the loss, of logits ``[B, C]``, or ``[B, P, C]`` of P probes."""
        right = logits.argmax(dim=-1).movedim(0, -1) == labels  # [B], or [P, B]; mixed clips count by their own label
        return {"acc1": right.float().mean() * 100}

    def measure(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Metrics in percent of scores ``[n, C]``; NaN where a video could not be read."""
        return accuracy(scores, labels)

    def class_table(self, scores: np.ndarray, labels: np.ndarray) -> tuple[list[str], dict[int, list]]:
        """Heads, and a row for each class that occurs: its number of videos and metrics in percent."""
        right = {k: in_top_k(scores, labels, k) for k in (1, 5)}
        rows = {
            int(label): [(labels == label).sum(), *(100 * right[k][labels == label].mean() for k in (1, 5))]
            for label in np.unique(labels)
        }
        return ["videos", "top1", "top5"], rows


@dataclass(frozen=True)
class SeveralLabels(Task):
    """Multi-label task, labels ``[n, C]`` of 0 and 1: sigmoid, binary cross-entropy, mAP."""

    needs_seconds: bool = False  # of each label of a list
    metric: ClassVar[str] = "map"
    shown: ClassVar[tuple[str, ...]] = ("map",)
    no_label: ClassVar[int | bytes] = b"-1"

    def parse_label(self, text: str) -> int | str:
        """A label of a list, checked by read_actions and kept as text."""
        actions = read_actions(text, self.num_classes)
        if self.needs_seconds and np.isinf(actions).any():
            raise ValueError(f"label {text[:80]!r} has no seconds, as in `92:11.90-21.20,147:0.00-12.60`")
        return text

    def clip_label(self, videos: VideoList, index: int, clip: Clip) -> np.ndarray:
        """The classes seen between the first and the last frame of a clip, 0 or 1, float32 ``[C]``.

        Raises:
            RunError: labels have seconds, and the video has neither time stamps nor a frame rate.
        """
        actions = read_actions(os.fsdecode(videos.labels[index]))
        if np.isinf(actions[:, 1]).all():
            return self.seen(actions)
        if not np.isfinite(clip.seconds).all():
            remedy = "scripts/data/resize_videos.py writes them"
            raise RunError(f"{videos.path(index)} has no time stamps, which labels in seconds need; {remedy}")
        return self.seen(actions, clip.seconds[0], clip.seconds[-1])

    def seen(self, actions: np.ndarray, start: float = -np.inf, end: float = np.inf) -> np.ndarray:
        """The classes of actions ``[A, 3]`` seen at any moment from one second to another, float32 ``[C]``."""
        label = np.zeros(self.num_classes, np.float32)
        label[actions[(actions[:, 1] <= end) & (actions[:, 2] >= start), 0].astype(int)] = 1
        return label

    def targets(self, labels: np.ndarray) -> np.ndarray:
        return np.stack([self.seen(read_actions(os.fsdecode(label))) for label in labels])

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid()

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=-1)

    def while_training(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}

    def measure(self, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The mean of average precision over the classes that any video shows, and their number."""
        of_classes = [values[-1] for values in self.class_table(scores, labels)[1].values()]
        return {"map": float(np.mean(of_classes)) if of_classes else 0.0, "classes": len(of_classes)}

    def class_table(self, scores: np.ndarray, labels: np.ndarray) -> tuple[list[str], dict[int, list]]:
        positive = labels > 0
        rows = {
            int(label): [positive[:, label].sum(), 100 * average_precision(scores[:, label], positive[:, label])]
            for label in np.flatnonzero(positive.any(axis=0))
        }
        return ["videos", "ap"], rows


ONE_LABEL = Task()


def judge(scores: list[VideoScore], videos: VideoList, task: Task, output_dir: str = "") -> dict[str, float]:
    """Metrics of a list from the scores of this process, the same in all processes.

    Args:
        output_dir: where the first process writes ``test_predictions.npz`` and ``test_per_class.csv``; empty: nowhere.
    Returns:
        those of the task, and the numbers of ``videos``, ``views`` and ``unreadable`` videos.
    """
    scores, metrics = gather_scores(scores), None
    if rank() == 0:
        combined = combine_views(scores, task.num_classes, task.combine)
        metrics = task.measure(combined, task.targets(videos.labels[[score.index for score in scores]]))
        unreadable = [score for score in scores if score.error]
        for score in unreadable:
            warn_once(f"counted as wrong, {videos.path(score.index)} could not be read: {score.error}")
        views = sum(len(score.views) for score in scores)
        metrics |= {"videos": len(scores), "views": views, "unreadable": len(unreadable)}
        if output_dir:
            write_test(Path(output_dir), scores, combined, videos, task)
    return broadcast(metrics)


def predict(scores: list[VideoScore], videos: VideoList, task: Task, output_dir: str = "") -> np.ndarray:
    """Scores of unlabelled videos, combined over views, in the first process; NaN where a video could not be read.

    It writes ``predictions.csv``, the likeliest classes of each video, and ``predictions.npz``, the scores of all.

    Args:
        output_dir: where to write them; empty: the current folder.
    Returns:
        ``[n, C]``; of other processes without rows.
    Raises:
        RunError: not one video could be read.
    """
    scores = gather_scores(scores)
    unreadable = [score for score in scores if score.error]
    for score in unreadable[: len(scores) - 1]:
        warn_once(f"no prediction, {videos.path(score.index)} could not be read: {score.error}")
    failed = rank() == 0 and len(unreadable) == len(scores)
    if reason := broadcast(f"{videos.path(scores[0].index)}: {scores[0].error}" if failed else ""):
        raise RunError(f"{videos.source}: no video could be read, the first: {reason}")
    if rank() != 0:
        return np.empty((0, task.num_classes))
    combined = combine_views(scores, task.num_classes, task.combine)
    paths, places = [videos.path(score.index) for score in scores], range(1, min(TOP, task.num_classes) + 1)
    with open(Path(output_dir, "predictions.csv"), "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", *(f"{head}{place}" for place in places for head in ("class", "score"))])
        for score, path, row in zip(scores, paths, combined):
            best = np.argsort(-row, kind="stable")[: 0 if score.error else TOP]
            table.writerow(
                [path, *(cell for c in best for cell in (task.names[c] if task.names else c, f"{row[c]:.4f}"))]
            )
    names = task.names or [str(c) for c in range(task.num_classes)]
    np.savez(Path(output_dir, "predictions.npz"), video=paths, scores=combined.astype(np.float32), classes=names)
    return combined


def write_test(folder: Path, scores: list[VideoScore], combined: np.ndarray, videos: VideoList, task: Task) -> None:
    """Scores of every video (per-view ones are NaN where it could not be read), and metrics by class."""
    num_views = max(len(score.views) for score in scores)
    views = np.full((len(scores), num_views, combined.shape[1]), np.nan, np.float32)
    for row, score in zip(views, scores):
        if len(score.views):
            row[:] = score.views
    labels = task.targets(videos.labels[[score.index for score in scores]])
    paths, mean = [videos.path(score.index) for score in scores], combined.astype(np.float32)
    np.savez(folder / "test_predictions.npz", video=paths, label=labels, scores=mean, view_scores=views)
    heads, rows = task.class_table(combined, labels)
    with open(folder / "test_per_class.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["class", "name", *heads])
        for label, (number, *values) in rows.items():
            name = task.names[label] if task.names else ""
            table.writerow([label, name, number, *(f"{value:.2f}" for value in values)])
