"""One epoch of pretraining: targets, masked prediction, loss, step. What surrounds the steps is in training.py.

Clips come as uint8 ``[B, 3, T, H, W]`` with masks bool ``[B, N]``, True = hidden.
"""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from modeling_finetune import normalize_clips
from modeling_pretrain import split_tokens, take_tokens
from training import Epoch


def with_second_masks(rng: np.random.Generator, masks: torch.Tensor) -> torch.Tensor:
    """Multiple sampling: each clip once more, with the mask of a random clip of the batch.

    Returns:
        ``[2·B, N]`` of ``[B, N]``: row b is clip b's own mask, row B + b its second one.
    """
    order = rng.permutation(len(masks))
    return torch.cat([masks, masks[order]])


def masked_loss(
    predictions: torch.Tensor, targets: torch.Tensor, masks: torch.Tensor, objects: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean squared error over hidden tokens and channels.

    Args:
        predictions: ``[R·B, N_masked, D]`` for R masks of each clip; targets: ``[B, N, D]``; masks: bool ``[R·B, N]``.
        objects: bool ``[B, N]``, True = under a pasted object.
    Returns:
        The loss, and values to log: the standard deviation over tokens of ``predictions`` (near 0 if they collapse) and
        of ``targets``, and with `objects` the loss of the hidden tokens under objects and of the others.
    """
    _, hidden = split_tokens(masks, predictions.shape[1])
    predictions, targets = predictions.float(), take_tokens(targets, hidden)
    logged = {"pred_std": predictions.detach().std(dim=1).mean(), "target_std": targets.std(dim=1).mean()}
    if objects is not None:
        errors = (predictions.detach() - targets).square().mean(dim=2)  # [R·B, N_masked]
        under = take_tokens(objects[..., None].float(), hidden)[..., 0]
        logged["loss_objects"] = (errors * under).sum() / under.sum()
        logged["loss_background"] = (errors * (1 - under)).sum() / (1 - under).sum()
    return F.mse_loss(predictions, targets), logged


def train_one_epoch(
    student: nn.Module,
    teacher: nn.Module,
    epoch: Epoch,
    norm: tuple[torch.Tensor, torch.Tensor],
    multiple_sampling: bool,
) -> None:
    """Train on the steps of an epoch.

    Args:
        norm: mean and std of the clips, ``[3, 1, 1, 1]`` on the device of the student.
        multiple_sampling: train every clip with two masks; the teacher sees it once.
    """
    student.train()
    device = norm[0].device
    for step in epoch.steps():
        for batch in step.micro_batches():  # in autocast; backward leaves it
            clips, masks = batch["clips"], batch["masks"]
            if multiple_sampling:
                masks = with_second_masks(step.rng, masks)  # [2·B, N]
            num_masked = int(masks[0].sum())  # on the CPU, the same in every row
            masks = masks.to(device, non_blocking=True)
            clips = normalize_clips(clips.to(device, non_blocking=True), *norm)
            targets = teacher(clips)  # [B, N, D], normalised
            predictions = student(clips, masks, num_masked)  # [R·B, N_masked, D]
            objects = batch["objects"].to(device, non_blocking=True) if "objects" in batch else None
            loss, logged = masked_loss(predictions, targets, masks, objects)
            step.backward(loss, **logged)
        step.update()
