"""One epoch of pretraining: targets, masked prediction, loss; training.py makes the steps.

Clips come as uint8 ``[B, 3, T, H, W]`` with masks bool ``[B, N]``, True = hidden.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from datasets import Batch
from modeling_pretrain import split_tokens, take_tokens
from optim_factory import Stepper
from training import Loss, run_steps
from utils import StepMeter


def normalize_clips(clips: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """uint8 ``[B, 3, T, H, W]`` → float of the same shape, (x / 255 - mean) / std; mean and std ``[3, 1, 1, 1]``."""
    return (clips.float() / 255 - mean) / std


def second_masks(masks: torch.Tensor, key: tuple[int, ...]) -> torch.Tensor:
    """Multiple sampling: each clip once more, with the mask of a random clip of the batch. ``[B, N]`` → ``[2·B, N]``."""
    order = np.random.default_rng(key).permutation(len(masks))
    return torch.cat([masks, masks[order]])


def masked_loss(predictions: torch.Tensor, targets: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """Mean squared error over hidden tokens and channels.

    Args:
        predictions: ``[R·B, N_masked, D]``; targets: ``[B, N, D]``; masks: bool ``[R·B, N]``.
    Returns:
        loss and, as a sign of collapse, the standard deviation over tokens of ``predictions`` and ``targets``.
    """
    _, hidden = split_tokens(masks, predictions.shape[1])
    predictions, targets = predictions.float(), take_tokens(targets, hidden)
    spread = {"pred_std": predictions.detach().std(dim=1).mean(), "target_std": targets.std(dim=1).mean()}
    return F.mse_loss(predictions, targets), spread


def train_one_epoch(
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterator[Batch],
    stepper: Stepper,
    meter: StepMeter,
    norm: tuple[torch.Tensor, torch.Tensor],
    first_step: int,
    chunk_key: Callable[[int, int], tuple[int, ...]],
    multiple_sampling: bool,
    after_step: Callable[[int], bool],
) -> None:
    """Train on the batches of an epoch, from optimizer step `first_step` of it on.

    Args:
        norm: mean and std of the clips, ``[3, 1, 1, 1]`` on the device.
        multiple_sampling: train every clip with two masks; the teacher sees it once.
        batches, chunk_key, after_step: see training.run_steps.
    """
    student.train()
    device = stepper.device

    def loss_of(batch: Batch, key: tuple[int, ...]) -> Loss:
        masks = second_masks(batch["extra"], key) if multiple_sampling else batch["extra"]
        num_masked = int(masks[0].sum())  # on the CPU, the same in every row
        masks = masks.to(device, non_blocking=True)
        clips = normalize_clips(batch["clips"].to(device, non_blocking=True), *norm)
        targets = teacher(clips)
        return masked_loss(student(clips, masks, num_masked), targets, masks)

    run_steps(batches, loss_of, stepper, meter, first_step, chunk_key, after_step)
