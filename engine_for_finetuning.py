"""Fine-tuning: one epoch of training, and scores of whole videos for validation and test.

Clips come as uint8 ``[B, 3, T, H, W]``; metrics and files of the scores are in evaluation.py.
"""

import random
from typing import Callable, Iterator

import numpy as np
import torch
import torch.nn as nn
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import Batch
from engine_for_pretraining import normalize_clips
from evaluation import VideoScore
from optim_factory import Stepper
from training import Loss, run_steps
from utils import StepMeter, rank


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
        return criterion(logits, targets), {"acc1": (logits.argmax(-1) == labels).float().mean() * 100}

    def stepped(done: int) -> bool:
        if ema:
            ema.update(stepper.module, step=meter.epoch * meter.steps_per_epoch + done)
        return after_step(done)

    run_steps(batches, loss_of, stepper, meter, first_step, chunk_key, stepped)


@torch.inference_mode()
def score_videos(model: nn.Module, loader: DataLoader, stepper: Stepper, norm: tuple[torch.Tensor, torch.Tensor],
                 batch_size: int = 32, title: str = "test") -> list[VideoScore]:
    """Class probabilities of each view of each video of this process.

    One video at a time, so that a score does not depend on which other videos share its batch.

    Args:
        loader: of datasets.EvalSample, unbatched.
        batch_size: views a forward pass.
    """
    model.eval()
    scores = []
    for sample in tqdm(loader, title, disable=rank() > 0, mininterval=5, leave=False):
        probabilities = []
        for views in sample["views"].split(batch_size) if not sample["error"] else ():
            clips = normalize_clips(views.to(stepper.device, non_blocking=True), *norm)
            with stepper.autocast():
                logits = model(clips)
            probabilities.append(logits.float().softmax(dim=-1).cpu())
        views = torch.cat(probabilities).numpy() if probabilities else np.empty((0, 0), np.float32)
        scores.append(VideoScore(sample["index"], views, sample["error"]))
    return scores
