"""One epoch of fine-tuning: augmentation of batches, loss, step. What surrounds the steps is in training.py.

Clips come as uint8 ``[B, 3, T, H, W]``; validation and test are in evaluation.py.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3, unwrap_model

from datasets import Batch
from modeling_finetune import normalize_clips
from training import Epoch


def erase(clips: torch.Tensor, seeds: torch.Tensor, eraser: RandomErasing) -> torch.Tensor:
    """Random erasing of the same rectangle in all frames of a clip, in place.

    Args:
        clips: normalised ``[B, 3, T, H, W]``.
        seeds: int64 ``[B]``; timm draws from the global generators, so each clip seeds them.
    """
    for clip, seed in zip(clips, seeds.tolist()):
        random.seed(seed)
        torch.manual_seed(seed)
        eraser(clip.view(-1, *clip.shape[2:]))  # [3·T, H, W]: to timm, an image of many channels
    return clips


def mix(clips: torch.Tensor, labels: torch.Tensor, mixup: Mixup) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup or CutMix of clips ``[B, 3, T, H, W]``, alike in all frames; labels ``[B]`` → soft ``[B, num_classes]``."""
    mixed, soft = mixup(clips.flatten(1, 2), labels)
    return mixed.unflatten(1, clips.shape[1:3]), soft


@dataclass(frozen=True)
class BatchAugmentation:
    """What happens to a batch on the device: normalisation, random erasing, Mixup or CutMix.

    Args:
        norm: mean and std of the clips, ``[3, 1, 1, 1]`` on the device.
    """

    norm: tuple[torch.Tensor, torch.Tensor]
    eraser: RandomErasing | None = None
    mixup: Mixup | None = None

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Augment a batch on the device.

        Returns:
        clips float ``[B, 3, T, H, W]``, labels int64 ``[B]`` (several: float ``[B, num_classes]``), and what to
        learn: these, or soft ``[B, num_classes]``.
        """
        device = self.norm[0].device
        clips = normalize_clips(batch["clips"].to(device, non_blocking=True), *self.norm).contiguous()
        labels = batch["labels"].to(device, non_blocking=True)
        if self.eraser:
            erase(clips, batch["erase"], self.eraser)
        if self.mixup:
            clips, targets = mix(clips, labels, self.mixup)
            return clips, labels, targets
        return clips, labels, labels


def balanced_weights(labels: np.ndarray, num_classes: int) -> torch.Tensor:
    """A loss weight for each class, ``[C]``: by the inverse of its number of videos, so that the mean over videos is 1.

    Args:
        labels: of the training videos, ``[n]``. A class that has none has weight 0.
    """
    counts = np.bincount(labels, minlength=num_classes)
    weights = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.from_numpy(np.where(counts, weights, 0)).float()


class WeightedCrossEntropy(nn.CrossEntropyLoss):
    """Cross-entropy averaged over clips; torch would divide by the sum of the weights of their classes.

    Args:
        weight: of the classes, ``[C]``, or None.
    """

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, C]``, labels ``[B]`` or soft ones ``[B, C]`` → scalar."""
        smoothing = self.label_smoothing
        return F.cross_entropy(logits, targets, self.weight, reduction="none", label_smoothing=smoothing).mean()


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    epoch: Epoch,
    augment: BatchAugmentation,
    measure: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]],
    ema: ModelEmaV3 | None = None,
) -> None:
    """Train on the steps of an epoch.

    Args:
        criterion: (logits ``[B, C]``, labels ``[B]`` or soft labels ``[B, C]``) → loss.
        measure: (logits, labels) → what the log shows besides.
        ema: average of the weights, updated after each step.
    """
    model.train()
    for step in epoch.steps():
        for batch in step.micro_batches():
            clips, labels, targets = augment(batch)
            logits = model(clips)  # [B, C], or [B, P, C] of P probes
            loss = criterion(logits, targets)  # the sum of the probes' losses
            mean = loss.detach() / logits.shape[1:-1].numel()
            step.backward(loss, loss=mean, **measure(logits, labels))
        step.update()
        if ema:
            ema.update(unwrap_model(model), step=step.number)
