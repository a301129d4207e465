"""From the scores of views to numbers: gathering over processes, top-1 and top-5, and the files a test writes.

A video is its line in the list. One that could not be read counts as wrong and is named.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from datasets import VideoList
from utils import broadcast, cpu_group, rank, warn_once, world_size


@dataclass(frozen=True)
class VideoScore:
    """What a model says of a video: its line in the list and class probabilities of its views.

    `views` is ``[V, C]``, or ``[V, P, C]`` from P probes; without rows if the video could not be read.
    """

    index: int
    views: np.ndarray
    error: str = ""

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


def average_views(scores: list[VideoScore], num_classes: int) -> np.ndarray:
    """Mean over the views of each video, float64 ``[n, C]``; NaN where a video could not be read."""
    unread = np.full(num_classes, np.nan)
    return np.stack([score.views.mean(axis=0, dtype=np.float64) if len(score.views) else unread for score in scores])


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


def judge(
    scores: list[VideoScore],
    videos: VideoList,
    num_classes: int,
    output_dir: str = "",
    classes: list[str] | None = None,
) -> dict[str, float]:
    """Metrics of a list from the scores of this process, the same in all processes.

    Args:
        output_dir: where the first process writes ``test_predictions.npz`` and ``test_per_class.csv``; empty: nowhere.
        classes: names for the table.
    Returns:
        accuracy(), and the numbers of ``videos``, ``views`` and ``unreadable`` videos.
    """
    scores, metrics = gather_scores(scores), None
    if rank() == 0:
        mean = average_views(scores, num_classes)
        metrics = accuracy(mean, videos.labels[[score.index for score in scores]])
        unreadable = [score for score in scores if score.error]
        for score in unreadable:
            warn_once(f"counted as wrong, {videos.path(score.index)} could not be read: {score.error}")
        metrics |= {
            "videos": len(scores),
            "views": sum(len(score.views) for score in scores),
            "unreadable": len(unreadable),
        }
        if output_dir:
            write_predictions(Path(output_dir), scores, mean, videos, classes)
    return broadcast(metrics)


def write_predictions(
    folder: Path, scores: list[VideoScore], mean: np.ndarray, videos: VideoList, classes: list[str] | None
) -> None:
    """Scores of every video (per-view ones are NaN where it could not be read), and accuracy by class."""
    num_views = max(len(score.views) for score in scores)
    views = np.full((len(scores), num_views, mean.shape[1]), np.nan, np.float32)
    for row, score in zip(views, scores):
        if len(score.views):
            row[:] = score.views
    labels = videos.labels[[score.index for score in scores]]
    np.savez(
        folder / "test_predictions.npz",
        video=[videos.path(score.index) for score in scores],
        label=labels,
        scores=mean.astype(np.float32),
        view_scores=views,
    )
    right = {k: in_top_k(mean, labels, k) for k in (1, 5)}
    with open(folder / "test_per_class.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["class", "name", "videos", "top1", "top5"])
        for label in np.unique(labels):
            of_class = labels == label
            table.writerow(
                [
                    label,
                    classes[label] if classes else "",
                    of_class.sum(),
                    *(f"{100 * right[k][of_class].mean():.2f}" for k in (1, 5)),
                ]
            )
