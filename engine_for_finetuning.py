"""Fine-tuning: one epoch of training, and scores of whole videos for validation and test.

Clips come as uint8 ``[B, 3, T, H, W]``; metrics and files of the scores are in evaluation.py.
"""

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn as nn
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader
from tqdm import tqdm

from data_loading import init_worker, unbatched
from datasets import Batch, EvalDataset, EvalSample, VideoError, VideoList, ViewReader
from engine_for_pretraining import normalize_clips
from evaluation import VideoScore, gather_scores, judge
from modeling_probe import MeanTokens, ProbedEncoder, nearest_neighbours
from modeling_teacher import channel_stats
from optim_factory import Stepper, autocast
from training import Loss, run_steps
from utils import RunError, RunLog, SharedError, StepMeter, logger, rank, warn_once, world_size


def erase(clips: torch.Tensor, seeds: torch.Tensor, eraser: RandomErasing) -> torch.Tensor:
    """Random erasing of the same rectangle in all frames of a clip, in place.

    Args:
        clips: normalised ``[B, 3, T, H, W]``.
        seeds: int64 ``[B]``; timm draws from the global generators, so each clip seeds them.
    """
    for clip, seed in zip(clips, seeds.tolist()):
        random.seed(seed)
        torch.manual_seed(seed)
        eraser(clip.flatten(0, 1))  # [3·T, H, W]: to timm, an image of many channels
    return clips


def mix(clips: torch.Tensor, labels: torch.Tensor, mixup: Mixup) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup or CutMix of clips ``[B, 3, T, H, W]``, alike in all frames; labels ``[B]`` → soft ``[B, num_classes]``."""
    mixed, soft = mixup(clips.flatten(1, 2), labels)
    return mixed.unflatten(1, clips.shape[1:3]), soft


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    batches: Iterator[Batch],
    stepper: Stepper,
    meter: StepMeter,
    norm: tuple[torch.Tensor, torch.Tensor],
    first_step: int,
    chunk_key: Callable[[int, int], tuple[int, ...]],
    after_step: Callable[[int], bool],
    mixup: Mixup | None = None,
    eraser: RandomErasing | None = None,
    ema: ModelEmaV3 | None = None,
) -> None:
    """Train on the batches of an epoch, from optimizer step `first_step` of it on.

    Args:
        criterion: (logits ``[B, C]``, labels ``[B]`` or soft labels ``[B, C]``) → loss.
        norm: mean and std of the clips, ``[3, 1, 1, 1]`` on the device.
        ema: average of the weights, updated after each step.
        batches, chunk_key, after_step: see training.run_steps.
    """
    model.train()
    device = stepper.device

    def loss_of(batch: Batch, key: tuple[int, ...]) -> Loss:
        clips = normalize_clips(batch["clips"].to(device, non_blocking=True), *norm).contiguous()
        labels = batch["extra"].to(device, non_blocking=True)
        targets = labels
        if eraser:
            erase(clips, batch["erase"], eraser)
        if mixup:
            clips, targets = mix(clips, labels, mixup)
        logits = model(clips)
        loss, probes = criterion(logits, targets), logits.shape[1:-1].numel()  # logits [B, C], or [B, P, C] of P probes
        right = logits.argmax(dim=-1) == labels.view(-1, *[1] * (logits.ndim - 2))
        return loss, {"loss": loss.detach() / probes, "acc1": right.float().mean() * 100}

    def stepped(done: int) -> bool:
        if ema:
            ema.update(stepper.module, step=meter.epoch * meter.steps_per_epoch + done)
        return after_step(done)

    run_steps(batches, loss_of, stepper, meter, first_step, chunk_key, stepped)


@dataclass
class Evaluator:
    """Validation and test of a classifier, of probes, or of nearest neighbours.

    Args:
        read_list: name of a list file → its videos.
        val_views, test_views: how videos are seen.
        timeout: seconds to wait for a video before stopping.
        output_dir: where the first process writes the scores of a test; empty: nowhere.
        classes: their names, if known.
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

    def __post_init__(self):
        self.norm = tuple(value.to(self.device) for value in channel_stats("imagenet"))

    def loader(self, videos: VideoList, read_views: ViewReader) -> Iterator[EvalSample]:
        """This process's share of a list; over all processes every video comes once."""
        mine = range(rank(), len(videos), world_size())
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
        finish: Callable = partial(torch.softmax, dim=-1),
    ) -> list[VideoScore]:
        """Class probabilities of each view of each video of this process.

        One video at a time, so that its scores do not depend on which other videos share its batch.

        Args:
            batch_size: views a forward pass.
            finish: what turns the model's output into scores.
        """
        model.eval()
        scores = []
        for sample in tqdm(samples, title, disable=rank() > 0, mininterval=5, leave=False):
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
            return judge(scores, videos, self.num_classes)
        found = [
            judge([score.of_probe(p) for score in scores], videos, self.num_classes) for p in range(len(model.settings))
        ]
        best = max(range(len(found)), key=lambda p: found[p]["acc1"])
        model.best.fill_(best)
        return found[best] | {"probe_lr": model.settings[best][0], "probe_wd": model.settings[best][1]}

    def test(self, model: nn.Module) -> int:
        """Test on all views; see report."""
        videos = self.read_list("test.csv")
        scores = self.scores(model, self.loader(videos, self.test_views), "test")
        if isinstance(model, ProbedEncoder):
            scores = [score.of_probe(int(model.best)) for score in scores]
        return self.report(scores, videos)

    def knn(self, encoder: nn.Module, k: int, train: VideoList) -> int:
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
        labels = torch.from_numpy(train.labels[[score.index for score in bank]])
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
        """Metrics of a test list, from this process's scores, to console, log.txt and files. Returns the exit code."""
        metrics = judge(scores, videos, self.num_classes, self.output_dir, self.classes)
        logger.info("test: %s", "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        RunLog(self.output_dir, "", sys.maxsize).epoch({f"test_{name}": value for name, value in metrics.items()})
        return 0

    def predict(self, model: nn.Module, path: str) -> int:
        """Print the five likeliest classes of a video. Returns the exit code.

        Raises:
            RunError: it cannot be read.
        """
        try:
            views = self.test_views(path)
        except VideoError as error:
            raise RunError(f"--predict {path}: {error}") from error
        score = self.scores(model, [{"index": 0, "views": views, "error": ""}], "predict")[0]
        mean = (score.of_probe(int(model.best)) if isinstance(model, ProbedEncoder) else score).views.mean(axis=0)
        for label in np.argsort(-mean)[:5]:
            print(f"{mean[label]:.4f}  {self.classes[label] if self.classes else label}")
        return 0
