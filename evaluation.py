"""Validation and test of whole videos: all views of a list through the network, one video at a time.

What the scores amount to, and the files of a test, are in metrics.py.
"""

import os
import sys
from collections import deque
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
from meters import RunLog
from metrics import ONE_LABEL, Task, VideoScore, gather_scores, judge, predict
from modeling_finetune import channel_stats, normalize_clips
from modeling_probe import MeanTokens, ProbedEncoder, TokenEncoder, nearest_neighbours
from optim_factory import autocast
from training import loader_failure
from utils import RunError, logger, progress, rank, warn_once, world_size


def stream_samples(stream: VideoStream, num_workers: int, timeout: float) -> Iterator[Any]:
    """The samples of a validation or test; a worker that hangs or dies stops the run with the videos it may have had.

    Args:
        timeout: seconds to wait for a sample.
    Raises:
        RunError: it hung, died, or raised.
    """
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=init_worker,
        timeout=timeout if num_workers else 0,
    )
    samples, done = iter(loader), set[int]()
    while True:
        try:
            sample = next(samples)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            ahead = ([index for index in share if index not in done] for share in stream.shares(max(1, num_workers)))
            raise loader_failure(
                error, deque([share[:1] for share in ahead]), stream.videos, hung=num_workers
            ) from error
        yield sample
        if sample["last"]:
            done.add(sample["index"])


@dataclass
class Evaluator:
    """Validation and test of a classifier, of probes, or of nearest neighbours.

    Args:
        read_list: name of a list file → its videos.
        val_views, test_views: how videos are seen.
        timeout: seconds to wait for a video before stopping.
        output_dir: where the first process writes the scores of a test; empty: nowhere.
        classes: their names, if known.
        task: what labels mean.
        batch_size: views in one forward pass.
    """

    device: torch.device
    precision: str
    num_classes: int
    read_list: Callable[[str], VideoList]
    val_views: ViewReader
    test_views: ViewReader
    num_workers: int = 0
    timeout: float = 0
    output_dir: str = ""
    classes: list[str] | None = None
    task: Task = ONE_LABEL
    batch_size: int = 16

    def __post_init__(self):
        self.norm = channel_stats("imagenet", self.device)

    def loader(
        self, videos: VideoList, read_views: ViewReader, mine: Sequence[int] | None = None
    ) -> Iterator[EvalSample]:
        """These lines of a list, or this process's share of it: over all processes every video comes once."""
        mine = range(rank(), len(videos), world_size()) if mine is None else mine
        stream = EvalDataset(videos, mine, read_views, self.batch_size)
        return stream_samples(stream, self.num_workers, self.timeout)

    def scores(self, model: nn.Module, samples: Iterable[EvalSample], title: str) -> list[VideoScore]:
        """Class probabilities of each view of each video of this process."""
        return list(self.each_score(model, samples, title, self.task.probabilities))

    @torch.inference_mode()
    def each_score(
        self,
        model: nn.Module,
        samples: Iterable[EvalSample],
        title: str,
        finish: Callable[[torch.Tensor], torch.Tensor] = lambda outputs: outputs,
    ) -> Iterator[VideoScore]:
        """What the model says of each video, as soon as all of its views have been seen.

        Views of different videos never share a batch, so that a video's scores depend on nothing else.

        Args:
            finish: turns the model's output into scores.
        """
        model.eval()
        outputs: dict[int, list[torch.Tensor]] = {}
        spans: dict[int, list[Span]] = {}
        for sample in progress(samples, title, "views", lambda sample: len(sample["views"])):
            index = sample["index"]
            if not sample["error"]:
                clips = normalize_clips(sample["views"].to(self.device, non_blocking=True), *self.norm)
                with autocast(self.device, self.precision):
                    outputs.setdefault(index, []).append(finish(model(clips).float()).cpu())
                spans.setdefault(index, []).extend(sample["spans"])
            if sample["last"]:
                views, times = outputs.pop(index, []), spans.pop(index, [])
                if sample["error"]:
                    views, times = [torch.empty(0)], []
                yield VideoScore(index, torch.cat(views).numpy(), sample["error"], times)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Metrics of val.csv on centre clips; of probes, those of the best one, which the model then remembers."""
        videos = self.read_list("val.csv")
        scores = self.scores(model, self.loader(videos, self.val_views), "validation")
        if not isinstance(model, ProbedEncoder):
            return judge(scores, videos, self.num_classes, task=self.task)
        found = [
            judge([score.of_probe(p) for score in scores], videos, self.num_classes, task=self.task)
            for p in range(len(model.settings))
        ]
        best = max(range(len(found)), key=lambda p: found[p][self.task.metric])
        model.best_probe = best
        return found[best] | {"probe_lr": model.settings[best][0], "probe_wd": model.settings[best][1]}

    def test(self, model: nn.Module) -> int:
        """Test on all views; see report."""
        videos = self.read_list("test.csv")
        return self.report(self.test_scores(model, videos), videos)

    def test_scores(self, model: nn.Module, videos: VideoList) -> list[VideoScore]:
        """Class probabilities on all views of this process's videos; of probes, the best one's."""
        scores = self.scores(model, self.loader(videos, self.test_views), "test")
        return [score.of_probe(model.best_probe) for score in scores] if isinstance(model, ProbedEncoder) else scores

    def knn(self, encoder: TokenEncoder, k: int, train: VideoList) -> int:
        """Test by a vote of the `k` nearest training videos, by the mean tokens of centre clips; see report.

        Raises:
            RunError: no training video can be read.
        """

        def features(videos: VideoList, title: str) -> list[VideoScore]:
            return list(self.each_score(MeanTokens(encoder), self.loader(videos, self.val_views), title))

        test = self.read_list("test.csv")
        train_scores = gather_scores(features(train, "train features"), everywhere=True)
        bank = [score for score in train_scores if not score.error]
        for score in train_scores:
            if score.error:
                warn_once(f"left out, {train.path(score.index)} could not be read: {score.error}")
        if not bank:
            raise RunError(f"{train.source}: none of its {len(train)} videos could be read")
        queries = features(test, "test features")
        known = torch.from_numpy(np.concatenate([score.views for score in bank]))
        labels = torch.from_numpy(self.task.targets(train.labels[[score.index for score in bank]]))
        seen = [score for score in queries if not score.error]
        asked = torch.cat([known[:0], *(torch.from_numpy(score.views) for score in seen)])
        votes = nearest_neighbours(known, labels, asked, k, self.num_classes).numpy()
        judged = [VideoScore(score.index, vote[None]) for score, vote in zip(seen, votes)]
        return self.report([score for score in queries if score.error] + judged, test)

    def report(self, scores: list[VideoScore], videos: VideoList) -> int:
        """Metrics of a test list, from this process's scores, to console, log.txt and files; of a list without labels,
        predictions. Returns the exit code.
        """
        if self.task.unlabelled(videos):
            logger.info("%s: its videos have no label (-1), so there are predictions and no accuracy", videos.source)
            return self.report_predictions(scores, videos)
        metrics = judge(scores, videos, self.num_classes, self.output_dir, self.classes, self.task)
        logger.info("test: %s", "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        RunLog(self.output_dir, "", sys.maxsize).epoch({f"test_{name}": value for name, value in metrics.items()})
        return 0

    def predict(self, model: nn.Module, videos: VideoList) -> int:
        """Predict the classes of videos without labels, on all views of the test. Returns the exit code."""
        return self.report_predictions(self.test_scores(model, videos), videos)

    def report_predictions(self, scores: list[VideoScore], videos: VideoList) -> int:
        """Print the five likeliest classes of a single video; write predictions of all. Returns the exit code."""
        combined = predict(scores, videos, self.num_classes, self.output_dir, self.classes, self.task)
        if rank() == 0 and len(videos) == 1:
            for label in np.argsort(-combined[0])[:5]:
                print(f"{combined[0, label]:.4f}  {self.classes[label] if self.classes else label}")
        logger.info(
            "%d videos: likeliest classes in %s, scores of all %d classes in predictions.npz beside it",
            len(videos),
            os.path.join(self.output_dir, "predictions.csv"),
            self.num_classes,
        )
        return 0
