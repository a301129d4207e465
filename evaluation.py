"""Validation and test of whole videos: all views of a list through the network, one video at a time.

What the scores amount to, and the files of a test, are in metrics.py.
"""

import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader

from datasets import VideoStream, init_worker
from datasets_finetune import EvalDataset, EvalSample, Span, ViewReader
from lists import VideoList
from meters import RunLog, guarded
from metrics import ONE_LABEL, Task, VideoScore, gather_scores, judge, predict
from modeling_finetune import channel_stats, normalize_clips
from modeling_probe import MeanTokens, ProbedEncoder, TokenEncoder, nearest_neighbours
from optim_factory import autocast
from utils import RunError, logger, progress, rank, warn_once, world_size

Finish = Callable[[torch.Tensor], torch.Tensor]


def stream_samples(stream: VideoStream, num_workers: int, timeout: float) -> Iterator[Any]:
    """The samples of a stream; `timeout` is the time in seconds to wait for one.

    Raises:
        RunError: a worker hung, died, or raised; it names the videos that the worker may have had.
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
    """The views of some lines of a list, by default of this process's share: over all processes every video comes once.

    Args:
        timeout: seconds to wait for a video before stopping.
        batch_size: views in a sample.
        mine: which lines.
    """
    mine = range(rank(), len(videos), world_size()) if mine is None else mine
    return stream_samples(EvalDataset(videos, mine, read_views, batch_size), num_workers, timeout)


@torch.inference_mode()
def score_videos(
    model: nn.Module,
    samples: Iterable[EvalSample],
    device: torch.device,
    precision: str,
    title: str,
    finish: Finish | None = None,
) -> Iterator[VideoScore]:
    """The model's output for each video, as soon as all of its views have been seen.

    Views of different videos never share a batch, so that a video's scores depend on nothing else.

    Args:
        title: of the progress bar.
        finish: turns the model's output into scores; None keeps it.
    """
    model.eval()
    norm = channel_stats("imagenet", device)
    outputs: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
    spans: defaultdict[int, list[Span]] = defaultdict(list)
    for sample in progress(samples, title, "views", lambda sample: len(sample["views"])):
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


@dataclass
class Evaluator:
    """Validation and test of a classifier, of probes, or of nearest neighbours.

    Args:
        val_views, test_views: how videos are seen.
        timeout: seconds to wait for a video before stopping.
        output_dir: where the first process writes the scores of a test; empty: nowhere.
        task: meaning, number and names of the classes.
    """

    device: torch.device
    precision: str
    val_views: ViewReader
    test_views: ViewReader
    num_workers: int = 0
    timeout: float = 0
    output_dir: str = ""
    task: Task = ONE_LABEL

    def outputs(
        self, model: nn.Module, videos: VideoList, views: ViewReader, title: str, finish: Finish | None = None
    ) -> list[VideoScore]:
        """The model's output for this process's share of a list; see score_videos."""
        samples = load_views(videos, views, self.num_workers, self.timeout)
        return list(score_videos(model, samples, self.device, self.precision, title, finish))

    def validate(self, model: nn.Module, videos: VideoList) -> dict[str, float]:
        """Metrics of a list on centre clips; of probes, those of the best one, which the model then remembers."""
        scores = self.outputs(model, videos, self.val_views, "validation", self.task.probabilities)
        if not isinstance(model, ProbedEncoder):
            return judge(scores, videos, self.task)
        found = [judge([score.of_probe(p) for score in scores], videos, self.task) for p in range(len(model.rates))]
        best = max(range(len(found)), key=lambda p: found[p][self.task.metric])
        model.best_probe = best
        return found[best] | {"probe_lr": model.rates[best][0], "probe_wd": model.rates[best][1]}

    def test(self, model: nn.Module, videos: VideoList) -> int:
        """Test on all views; see report."""
        return self.report(self.test_scores(model, videos), videos)

    def test_scores(self, model: nn.Module, videos: VideoList) -> list[VideoScore]:
        """Class probabilities on all views of this process's videos; of probes, the best one's."""
        scores = self.outputs(model, videos, self.test_views, "test", self.task.probabilities)
        return [score.of_probe(model.best_probe) for score in scores] if isinstance(model, ProbedEncoder) else scores

    def knn(self, encoder: TokenEncoder, k: int, train: VideoList, test: VideoList) -> int:
        """Test by a vote of the `k` nearest training videos, by the mean tokens of centre clips; see report.

        Raises:
            RunError: no training video can be read.
        """
        features = MeanTokens(encoder)
        found = self.outputs(features, train, self.val_views, "train features")
        train_scores = gather_scores(found, everywhere=True)
        bank = [score for score in train_scores if not score.error]
        for score in train_scores:
            if score.error:
                warn_once(f"left out, {train.path(score.index)} could not be read: {score.error}")
        if not bank:
            raise RunError(f"{train.source}: none of its {len(train)} videos could be read")
        queries = self.outputs(features, test, self.val_views, "test features")
        known = torch.from_numpy(np.concatenate([score.views for score in bank]))
        labels = torch.from_numpy(self.task.targets(train.labels[[score.index for score in bank]]))
        seen = [score for score in queries if not score.error]
        asked = torch.cat([known[:0], *(torch.from_numpy(score.views) for score in seen)])
        votes = nearest_neighbours(known, labels, asked, k, self.task.num_classes).numpy()
        judged = [VideoScore(score.index, vote[None]) for score, vote in zip(seen, votes)]
        return self.report([score for score in queries if score.error] + judged, test)

    def report(self, scores: list[VideoScore], videos: VideoList) -> int:
        """Metrics of a test list, from this process's scores, to console, log.txt and files; of a list without labels,
        predictions. Returns the exit code.
        """
        if self.task.unlabelled(videos):
            logger.info("%s: its videos have no label (-1), so there are predictions and no accuracy", videos.source)
            return self.report_predictions(scores, videos)
        metrics = judge(scores, videos, self.task, self.output_dir)
        logger.info("test: %s", "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        RunLog(self.output_dir, "", sys.maxsize).epoch({f"test_{name}": value for name, value in metrics.items()})
        return 0

    def predict(self, model: nn.Module, videos: VideoList) -> int:
        """Predict the classes of videos without labels, on all views of the test. Returns the exit code."""
        return self.report_predictions(self.test_scores(model, videos), videos)

    def report_predictions(self, scores: list[VideoScore], videos: VideoList) -> int:
        """Print the five likeliest classes of a single video; write predictions of all. Returns the exit code."""
        combined = predict(scores, videos, self.task, self.output_dir)
        if rank() == 0 and len(videos) == 1:
            for label in np.argsort(-combined[0])[:5]:
                print(f"{combined[0, label]:.4f}  {self.task.names[label] if self.task.names else label}")
        told = "%d videos: likeliest classes in %s, scores of all %d classes in predictions.npz beside it"
        logger.info(told, len(videos), os.path.join(self.output_dir, "predictions.csv"), self.task.num_classes)
        return 0
