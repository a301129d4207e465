"""From the scores of views to numbers: gathering over processes, accuracy or average precision, and a test's files.

A video is its line in the list. One that could not be read counts as wrong and is named. Task holds everything that
differs where videos have several labels.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from datasets import VideoList
from datasets_finetune import Span
from utils import broadcast, cpu_group, rank, warn_once, world_size


@dataclass(frozen=True)
class VideoScore:
    """What a model says of a video: its line in the list and class probabilities of its views.

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
    """Area under the steps of precision over recall, of the videos by falling score; equal scores are one step.

    Args:
        scores: ``[n]``; NaN comes after all others.
        positive: bool ``[n]``, at least one of them.
    """
    scores = np.where(np.isnan(scores), np.nanmin(scores, initial=0) - 1, scores)
    order = np.argsort(-scores)
    hits = np.cumsum(positive[order])
    steps = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last of equal scores
    return float((np.diff(hits[steps], prepend=0) * hits[steps] / (steps + 1)).sum() / hits[-1])


@dataclass(frozen=True)
class Task:
    """A video shows one class: softmax, cross-entropy, accuracy. What differs with several is in SeveralLabels.

    Args:
        combine: mean | max: how the scores of a video's views become one.
    """

    combine: str = "mean"
    metric: ClassVar[str] = "acc1"  # picks the best weights
    shown: ClassVar[tuple[str, ...]] = ("acc1", "acc5")

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
    """A video shows any number of classes, labels ``[n, C]`` of 0 and 1: sigmoid, binary cross-entropy, mAP."""

    metric: ClassVar[str] = "map"
    shown: ClassVar[tuple[str, ...]] = ("map",)

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


def task_of(multi_label: bool, combine: str = "mean") -> Task:
    """What labels mean in a data set."""
    return SeveralLabels(combine) if multi_label else Task(combine)


def judge(
    scores: list[VideoScore],
    videos: VideoList,
    num_classes: int,
    output_dir: str = "",
    classes: list[str] | None = None,
    task: Task = ONE_LABEL,
) -> dict[str, float]:
    """Metrics of a list from the scores of this process, the same in all processes.

    Args:
        output_dir: where the first process writes ``test_predictions.npz`` and ``test_per_class.csv``; empty: nowhere.
        classes: names for the table.
    Returns:
        those of the task, and the numbers of ``videos``, ``views`` and ``unreadable`` videos.
    """
    scores, metrics = gather_scores(scores), None
    if rank() == 0:
        combined = combine_views(scores, num_classes, task.combine)
        metrics = task.measure(combined, videos.labels[[score.index for score in scores]])
        unreadable = [score for score in scores if score.error]
        for score in unreadable:
            warn_once(f"counted as wrong, {videos.path(score.index)} could not be read: {score.error}")
        metrics |= {
            "videos": len(scores),
            "views": sum(len(score.views) for score in scores),
            "unreadable": len(unreadable),
        }
        if output_dir:
            write_predictions(Path(output_dir), scores, combined, videos, classes, task)
    return broadcast(metrics)


def write_predictions(
    folder: Path,
    scores: list[VideoScore],
    combined: np.ndarray,
    videos: VideoList,
    classes: list[str] | None,
    task: Task,
) -> None:
    """Scores of every video (per-view ones are NaN where it could not be read), and metrics by class."""
    num_views = max(len(score.views) for score in scores)
    views = np.full((len(scores), num_views, combined.shape[1]), np.nan, np.float32)
    for row, score in zip(views, scores):
        if len(score.views):
            row[:] = score.views
    labels = videos.labels[[score.index for score in scores]]
    np.savez(
        folder / "test_predictions.npz",
        video=[videos.path(score.index) for score in scores],
        label=labels,
        scores=combined.astype(np.float32),
        view_scores=views,
    )
    heads, rows = task.class_table(combined, labels)
    with open(folder / "test_per_class.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["class", "name", *heads])
        for label, (number, *values) in rows.items():
            name = classes[label] if classes else ""
            table.writerow([label, name, number, *(f"{value:.2f}" for value in values)])
