"""Validation and test of whole videos: all views of a list through the network, one video at a time.

What the scores amount to, and the files of a test, are in metrics.py.
"""

import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader

from datasets import init_worker
from datasets_finetune import EvalDataset, EvalSample, ViewReader
from lists import VideoList
from metrics import ONE_LABEL, Task, VideoScore, gather_scores, judge, predict
from modeling_probe import Encoder, MeanTokens, ProbedEncoder, nearest_neighbours
from optim_factory import autocast
from training import loader_failure
from utils import RunLog, SharedError, logger, progress, rank, warn_once, world_size
from video_transforms import channel_stats, normalize_clips


def unbatched(loader: DataLoader, order: Sequence[int], videos: VideoList) -> Iterator:
    """The samples of a validation or test; a worker that hangs or dies stops the run with the videos it may have had.

    Args:
        order: what the loader's sampler gives.
    Raises:
        RunError: it hung, died, or raised.
    """
    samples, ahead = iter(loader), max(1, loader.num_workers * (loader.prefetch_factor or 1))
    for place in itertools.count():
        try:
            sample = next(samples)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            flying = deque([index] for index in order[place : place + ahead])
            raise loader_failure(error, flying, videos) from error
        yield sample


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

    def __post_init__(self):
        self.norm = channel_stats("imagenet", self.device)

    def loader(
        self, videos: VideoList, read_views: ViewReader, mine: Sequence[int] | None = None
    ) -> Iterator[EvalSample]:
        """These lines of a list, or this process's share of it: over all processes every video comes once."""
        mine = range(rank(), len(videos), world_size()) if mine is None else mine
        loader = DataLoader(
            EvalDataset(videos, read_views),
            batch_size=None,
            sampler=mine,
            num_workers=self.num_workers,
            worker_init_fn=init_worker,
            timeout=self.timeout if self.num_workers else 0,
        )
        return unbatched(loader, mine, videos)

    @torch.inference_mode()
    def scores(
        self,
        model: nn.Module,
        samples: Iterable[EvalSample],
        title: str,
        batch_size: int = 16,
        finish: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> list[VideoScore]:
        """Class probabilities of each view of each video of this process.

        One video at a time, so that its scores do not depend on which other videos share its batch.

        Args:
            batch_size: views a forward pass.
            finish: what turns the model's output into scores; None: the task's probabilities.
        """
        model.eval()
        finish = finish or self.task.probabilities
        scores = []
        for sample in progress(samples, title):
            outputs = [torch.empty(0)]
            for views in sample["views"].split(batch_size) if not sample["error"] else ():
                clips = normalize_clips(views.to(self.device, non_blocking=True), *self.norm)
                with autocast(self.device, self.precision):
                    outputs.append(finish(model(clips).float()).cpu())
            scores.append(VideoScore(sample["index"], torch.cat(outputs[1:] or outputs).numpy(), sample["error"]))
        return scores

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

    def knn(self, encoder: Encoder, k: int, train: VideoList) -> int:
        """Test by a vote of the `k` nearest training videos, by the mean tokens of centre clips; see report.

        Raises:
            RunError: no training video can be read.
        """

        def features(videos: VideoList, title: str) -> list[VideoScore]:
            return self.scores(MeanTokens(encoder), self.loader(videos, self.val_views), title, finish=lambda x: x)

        test = self.read_list("test.csv")
        train_scores = gather_scores(features(train, "train features"), everywhere=True)
        bank = [score for score in train_scores if not score.error]
        for score in train_scores:
            if score.error:
                warn_once(f"left out, {train.path(score.index)} could not be read: {score.error}")
        if not bank:
            raise SharedError(f"{train.source}: none of its {len(train)} videos could be read")
        queries = features(test, "test features")
        known = torch.from_numpy(np.concatenate([score.views for score in bank]))
        labels = torch.from_numpy(self.task.targets(train.labels[[score.index for score in bank]]))
        votes = [
            score
            if score.error
            else VideoScore(
                score.index,
                nearest_neighbours(known, labels, torch.from_numpy(score.views), k, self.num_classes).numpy(),
            )
            for score in queries
        ]
        return self.report(votes, test)

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
