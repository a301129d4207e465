"""Validation and test: scores of the views of whole videos, their metrics, and the files of a test.

A video is identified by its line in the list. One that could not be read counts as wrong and is named in the log.
"""

import csv
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.data import DataLoader
from tqdm.contrib.logging import tqdm_logging_redirect

from datasets import VideoStream, init_worker
from datasets_finetune import EvalDataset, EvalSample, Span, ViewReader
from lists import VideoList
from meters import RunLog, check_bad_fraction, guarded
from metrics import Task, VideoScore, combine_views
from modeling_finetune import channel_stats, normalize_clips
from modeling_probe import Features, ProbedEncoder, TokenEncoder, nearest_neighbours
from optim_factory import autocast
from utils import RunError, broadcast, cpu_group, logger, rank, warn_once, world_size

Finish = Callable[[torch.Tensor], torch.Tensor]
TOP = 5  # classes of each video in predictions.csv


def stream_samples(stream: VideoStream, num_workers: int, timeout: float) -> Iterator[Any]:
    """Load the samples of a stream; `timeout` is the time in seconds to wait for one.

    Raises:
        RunError: a worker hung, died, or raised; it names the videos that the worker may have been reading.
    """
    timeout = timeout if num_workers else 0
    loader = DataLoader(stream, batch_size=None, num_workers=num_workers, worker_init_fn=init_worker, timeout=timeout)
    done = set[int]()

    def issued() -> list[list[int]]:
        shares = stream.shares(max(1, num_workers))
        return [[index for index in share if index not in done][:1] for share in shares]

    for sample in guarded(loader, stream.videos, issued, hung=num_workers):
        yield sample
        if sample["last"]:
            done.add(sample["index"])


def load_views(
    videos: VideoList,
    read_views: ViewReader,
    num_workers: int = 0,
    timeout: float = 0,
    batch_size: int = 16,
    mine: Sequence[int] | None = None,
) -> Iterator[EvalSample]:
    """Load the views of this process's share of a list.

    Args:
        timeout: seconds to wait for a video before stopping.
        batch_size: views in a sample.
        mine: the lines to load, by default every `world_size`-th.
    """
    mine = range(rank(), len(videos), world_size()) if mine is None else mine
    return stream_samples(EvalDataset(videos, mine, read_views, batch_size), num_workers, timeout)


def progress(samples: Iterable[EvalSample], title: str) -> Iterator[EvalSample]:
    """Yield samples while showing a progress bar that counts views; without a terminal, log the beginning."""
    terminal = sys.stderr.isatty()
    if not terminal:
        logger.info("%s begins", title)
    disable = rank() > 0 or not terminal
    with tqdm_logging_redirect(desc=title, unit=" views", disable=disable, leave=False) as bar:
        for sample in samples:
            yield sample
            bar.update(len(sample["views"]))


@torch.inference_mode()
def score_videos(
    model: nn.Module,
    samples: Iterable[EvalSample],
    device: torch.device,
    precision: str,
    title: str,
    finish: Finish | None = None,
) -> Iterator[VideoScore]:
    """Yield the model's output for each video, once all of its views have been computed.

    Views of different videos never share a batch, so that a video's scores depend on that video alone.

    Args:
        title: of the progress bar.
        finish: converts the model's output to scores.
    """
    model.eval()
    norm = channel_stats("imagenet", device)
    outputs: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
    spans: defaultdict[int, list[Span]] = defaultdict(list)
    for sample in progress(samples, title):
        index = sample["index"]
        if not sample["error"]:
            clips = normalize_clips(sample["views"].to(device, non_blocking=True), *norm)
            with autocast(device, precision):
                output = model(clips).float()
                outputs[index].append((finish(output) if finish else output).cpu())
            spans[index] += sample["spans"]
        if sample["last"]:
            views, times = outputs.pop(index, []), spans.pop(index, [])
            if sample["error"]:
                views, times = [torch.empty(0)], []
            yield VideoScore(index, torch.cat(views).numpy(), sample["error"], times)


def gather_scores(scores: list[VideoScore], everywhere: bool = False) -> list[VideoScore]:
    """Collect the scores of all processes in the order of the list, in the first process or `everywhere`; else []."""
    parts: list[list[VideoScore]] = [scores]
    if world_size() > 1:
        parts = [[] for _ in range(world_size())]
        if everywhere:
            dist.all_gather_object(parts, scores, group=cpu_group())
        else:
            dist.gather_object(scores, parts if rank() == 0 else None, dst=0, group=cpu_group())
    return sorted((score for part in parts for score in part), key=lambda score: score.index)


def warn_of_unreadable(scores: list[VideoScore], videos: VideoList, effect: str) -> int:
    """Log the videos that could not be read, and return their number."""
    unreadable = [score for score in scores if score.error]
    for score in unreadable:
        warn_once(f"{effect}, {videos.path(score.index)} could not be read: {score.error}")
    return len(unreadable)


# Metrics and files ----------------------------------------------------------------------------------------------


def compute_metrics(
    scores: list[VideoScore], videos: VideoList, task: Task, output_dir: str = "", title: str = ""
) -> dict[str, float]:
    """Compute the metrics of a list, the same in all processes, from the scores that each of them has.

    Args:
        output_dir: where the first process writes ``test_predictions.npz`` and ``test_per_class.csv``; empty: nowhere.
        title: with one, the metrics are logged under it, before files are written.
    Returns:
        those of the task, and the numbers of ``videos``, ``views`` and ``unreadable`` videos.
    """
    scores, metrics = gather_scores(scores), None
    if rank() == 0:
        combined = combine_views(scores, task.num_classes, task.combine)
        labels = task.targets(videos.labels[[score.index for score in scores]])
        unreadable = warn_of_unreadable(scores, videos, "counted as wrong")
        views = sum(len(score.views) for score in scores)
        metrics = task.measure(combined, labels) | {"videos": len(scores), "views": views, "unreadable": unreadable}
        if title:
            logger.info("%s: %s", title, "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
            log_test(output_dir, metrics)
        if output_dir:
            write_test(Path(output_dir), scores, combined, labels, videos, task)
    return broadcast(metrics)


def predict(scores: list[VideoScore], videos: VideoList, task: Task, output_dir: str) -> int:
    """Predict the classes of unlabelled videos from the scores of this process; those of a single video are printed.

    The first process writes ``predictions.csv``, the most probable classes of each video, and ``predictions.npz``, the
    scores of all classes, combined over views; NaN for unreadable videos.

    Args:
        output_dir: where to write them; empty: the current folder.
    Returns:
        the number of unreadable videos, in all processes.
    Raises:
        RunError: no video could be read.
    """
    scores = gather_scores(scores)
    failed = rank() == 0 and all(score.error for score in scores)
    warn_of_unreadable(scores[1:] if failed else scores, videos, "no prediction")
    if reason := broadcast(f"{videos.path(scores[0].index)}: {scores[0].error}" if failed else ""):
        raise RunError(f"{videos.source}: no video could be read, the first: {reason}")
    if rank() == 0:
        write_predictions(Path(output_dir), scores, videos, task)
    return broadcast(sum(bool(score.error) for score in scores))


def write_predictions(folder: Path, scores: list[VideoScore], videos: VideoList, task: Task) -> None:
    """Write the files of predict, and print the classes of a single video."""
    combined, names = combine_views(scores, task.num_classes, task.combine), task.names or range(task.num_classes)
    paths, places = [videos.path(score.index) for score in scores], range(1, min(TOP, task.num_classes) + 1)
    rows: list[list] = [["path", *(f"{head}{place}" for place in places for head in ("class", "score"))]]
    for score, path, row in zip(scores, paths, combined):
        best = np.argsort(-row, kind="stable")[: 0 if score.error else TOP]
        rows.append([path, *(cell for c in best for cell in (names[c], f"{row[c]:.4f}"))])
    write_table(folder / "predictions.csv", rows)
    classes = [str(name) for name in names]
    np.savez(folder / "predictions.npz", video=paths, scores=combined.astype(np.float32), classes=classes)
    if len(videos) == 1:
        for name, score in zip(rows[1][1::2], rows[1][2::2]):
            print(f"{score}  {name}")
    message = "%d videos: most probable classes in %s, scores of all %d classes in predictions.npz beside it"
    logger.info(message, len(videos), folder / "predictions.csv", task.num_classes)


def write_test(
    folder: Path, scores: list[VideoScore], combined: np.ndarray, labels: np.ndarray, videos: VideoList, task: Task
) -> None:
    """Write the scores of each video (per view NaN if it could not be read), and metrics of each class."""
    num_views = max(len(score.views) for score in scores)
    views = np.full((len(scores), num_views, combined.shape[1]), np.nan, np.float32)
    for row, score in zip(views, scores):
        if len(score.views):
            row[:] = score.views
    paths, mean = [videos.path(score.index) for score in scores], combined.astype(np.float32)
    np.savez(folder / "test_predictions.npz", video=paths, label=labels, scores=mean, view_scores=views)
    heads, classes = task.class_table(combined, labels)
    rows: list[list] = [["class", "name", *heads]]
    for label, (number, *values) in classes.items():
        rows.append([label, task.names[label] if task.names else "", number, *(f"{value:.2f}" for value in values)])
    write_table(folder / "test_per_class.csv", rows)


def write_table(path: Path, rows: list[list]) -> None:
    """Write a CSV file."""
    with open(path, "w", newline="", errors="surrogateescape") as file:  # names of files may be any bytes
        csv.writer(file).writerows(rows)


def log_test(output_dir: str, metrics: dict[str, float]) -> None:
    """Append the metrics of a test to ``log.txt``."""
    RunLog(output_dir, "", sys.maxsize).epoch({f"test_{name}": value for name, value in metrics.items()})


@dataclass
class Evaluator:
    """Validation and test of a classifier, of probes, or of nearest neighbours.

    Args:
        val_views, test_views: which views of a video are used.
        task: meaning, number and names of the classes.
        timeout: seconds to wait for a video before stopping.
        output_dir: where the first process writes the scores of a test; empty: nowhere.
        max_bad_fraction: of the videos, that may be unreadable; see check.
    """

    device: torch.device
    precision: str
    val_views: ViewReader
    test_views: ViewReader
    task: Task
    num_workers: int = 0
    timeout: float = 0
    output_dir: str = ""
    max_bad_fraction: float = 1.0

    def outputs(
        self, model: nn.Module, videos: VideoList, views: ViewReader, title: str, finish: Finish | None = None
    ) -> list[VideoScore]:
        """Compute the model's outputs for this process's share of a list; see score_videos."""
        samples = load_views(videos, views, self.num_workers, self.timeout)
        return list(score_videos(model, samples, self.device, self.precision, title, finish))

    def validate(self, model: nn.Module, videos: VideoList) -> dict[str, float]:
        """Compute metrics on centre clips; of probes, those of the best one, whose index the model keeps."""
        scores = self.outputs(model, videos, self.val_views, "validation", self.task.probabilities)
        if not isinstance(model, ProbedEncoder):
            metrics = compute_metrics(scores, videos, self.task)
            self.check(metrics["unreadable"], videos)
            return metrics
        found = [
            compute_metrics([score.of_probe(p) for score in scores], videos, self.task) for p in range(len(model.lr_wd))
        ]
        self.check(found[0]["unreadable"], videos)
        best = max(range(len(found)), key=lambda p: found[p][self.task.metric])
        model.best.fill_(best)
        return found[best] | {"probe_lr": model.lr_wd[best][0], "probe_wd": model.lr_wd[best][1]}

    def test(self, model: nn.Module, videos: VideoList, labelled: bool = True) -> None:
        """Test on all views, or predict the classes of videos that are not `labelled`; see report."""
        scores = self.outputs(model, videos, self.test_views, "test", self.task.probabilities)
        if isinstance(model, ProbedEncoder):
            scores = [score.of_probe(int(model.best)) for score in scores]
        self.report(scores, videos, labelled)

    def knn(self, encoder: TokenEncoder, k: int, train: VideoList, test: VideoList) -> None:
        """Test by a vote of the `k` nearest training videos, compared by the mean tokens of centre clips; see report.

        Raises:
            RunError: no training video can be read.
        """
        features = Features(encoder)
        known = gather_scores(self.outputs(features, train, self.val_views, "train features"), everywhere=True)
        if (unreadable := warn_of_unreadable(known, train, "left out")) == len(known):
            raise RunError(f"{train.source}: none of its {len(train)} videos could be read")
        self.check(unreadable, train)
        known = [score for score in known if not score.error]
        queries = self.outputs(features, test, self.val_views, "test features")
        seen = [score for score in queries if not score.error]
        bank = torch.from_numpy(np.concatenate([score.views for score in known]))
        asked = torch.cat([bank[:0], *(torch.from_numpy(score.views) for score in seen)])
        labels = torch.from_numpy(self.task.targets(train.labels[[score.index for score in known]]))
        votes = nearest_neighbours(bank, labels, asked, k, self.task.num_classes).numpy()
        judged = [VideoScore(score.index, vote[None]) for score, vote in zip(seen, votes)]
        self.report([score for score in queries if score.error] + judged, test)

    def report(self, scores: list[VideoScore], videos: VideoList, labelled: bool = True) -> None:
        """Write and log metrics from this process's scores, or predictions if there are no labels."""
        if labelled and not self.task.unlabelled(videos):
            metrics = compute_metrics(scores, videos, self.task, self.output_dir, "test")
            self.check(metrics["unreadable"], videos)
            return
        if labelled:
            logger.info("%s has no labels (-1): writing predictions, no accuracy", videos.source)
        self.check(predict(scores, videos, self.task, self.output_dir), videos)

    def check(self, unreadable: float, videos: VideoList) -> None:
        """Raise RunError if too many videos of a list could not be read."""
        check_bad_fraction(unreadable, len(videos), self.max_bad_fraction, f"{videos.source}: they are named above")
