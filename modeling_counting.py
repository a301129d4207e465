"""Counting repetitions: a head that predicts the lengths of the previous and the next cycle, and the count.

After Zhang et al., Context-aware and scale-insensitive temporal repetition counting (CVPR 2020).

A *segment* has F frames, numbered from 0. A *moment* m is one of its frames; it has two *sides*: 0, the cycle that ends
at m, and 1, the cycle that begins at m. The *offset* of a side is the number of frames from m to the same phase of the
neighbouring cycle; its *length* is offset + 1, the number of frames of the cycle including both ends.

Lengths are refined iteratively. The network sees a window on each side, whose size follows the current guess of the
length. For each of seven *anchors* (factors on the guess) it predicts whether the anchor is close to the true length,
and a correction of the logarithm. The corrected length is the next guess (`decode`).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from modeling_finetune import VisionTransformer, channel_stats, normalize_clips

ANCHORS = torch.tensor([0.5, 0.67, 0.8, 1.0, 1.25, 1.5, 2.0])
MIDDLE = 3  # the anchor with factor 1
NO_NEIGHBOUR = -1.0  # in place of an offset
MIN_IOU = 0.5  # of anchor and true length: anchors are positive from here
BOX_WEIGHT = 50.0
BOX_LIMIT = 0.5  # corrections of the logarithm are clipped to this
MIN_LENGTH, MIN_CYCLES = 4.0, 2  # of a cycle, of a segment
START_SCALES = (0.03, 0.35, 30)  # first guesses: lowest, highest (fractions of the segment), number
MERGE = 0.5  # weight of a new length against the guess, on the first level
STRIDE_SHARES = (5, 21)  # training moves a fifth to a twentieth of the segment per step
LEVELS = ((1, 4), (4, 4), (8, 2), (16, 1), (32, 1))  # of counting: number of moments, corrections
MEAN_COLOUR = (255 * channel_stats("imagenet")[0].flatten()).round().to(torch.uint8)


class Prediction(NamedTuple):
    """Predictions for B windows."""

    logits: torch.Tensor  # [B, 2 sides, 7 anchors, 2 (negative, positive)]
    boxes: torch.Tensor  # [B, 2, 7], correction of the logarithm of each anchor


# Targets --------------------------------------------------------------------------------------------------------


def cycle_offsets(bounds: torch.Tensor) -> torch.Tensor:
    """Compute the offsets of all frames from the first boundary to the last, float ``[F, 2]``; NO_NEIGHBOUR if none.

    The phase of a frame is its relative position between the boundaries around it. Neighbouring cycles that differ by
    more than 2 frames and by more than a factor of 1.3 do not count as repetitions (the rule of UCFRep).

    Args:
        bounds: frames where one cycle ends and the next begins, increasing, ``[C + 1]``.
    """
    bounds = bounds.double()
    lengths = bounds.diff()
    frames = torch.arange(int(bounds[0]), int(bounds[-1]) + 1, dtype=torch.float64)
    cycle = (torch.searchsorted(bounds, frames, right=True) - 1).clamp(max=len(lengths) - 1)
    phase = (frames - bounds[cycle]) / lengths[cycle]
    offsets = []
    for other, sign in ((cycle - 1, -1), (cycle + 1, 1)):
        inside = (other >= 0) & (other < len(lengths))
        other = other.clamp(0, len(lengths) - 1)
        pair = torch.stack([lengths[cycle], lengths[other]])
        alike = (pair.diff(dim=0)[0].abs() <= 2) | (pair.amax(0) <= 1.3 * pair.amin(0))
        offset = sign * (bounds[other] + phase * lengths[other] - frames)
        offsets.append(torch.where(inside & alike, offset, NO_NEIGHBOUR))
    return torch.stack(offsets, dim=1).float()


def anchor_targets(offsets: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute training targets for true offsets ``[B, 2]`` and guessed lengths ``[B, 2]``, in frames.

    Returns:
        classes int ``[B, 2, 7]``: 1 positive, 0 negative, -1 ignored (no neighbour); boxes float ``[B, 2, 7]``,
        used where the class is 1.
    """
    ratio = (offsets + 1)[..., None] / (ANCHORS.to(lengths) * lengths[..., None])
    near = torch.minimum(ratio, 1 / ratio) >= MIN_IOU
    unknown = (offsets == NO_NEIGHBOUR)[..., None]
    return near.long().masked_fill(unknown, -1), ratio.masked_fill(unknown, 1.0).log()


def decode(prediction: Prediction, lengths: torch.Tensor) -> torch.Tensor:
    """Compute lengths ``[B, 2]`` from the prediction for the guess `lengths` ``[B, 2]``; the inverse of anchor_targets.

    Uses the most probable anchor; of equally probable ones, the one with the smallest correction.
    """
    near = prediction.logits.float().softmax(dim=-1)[..., 1]
    boxes = prediction.boxes.float()
    best = (near - 1e-6 * boxes.abs()).argmax(dim=-1, keepdim=True)
    box = boxes.gather(-1, best)[..., 0].clamp(-BOX_LIMIT, BOX_LIMIT)
    return lengths * ANCHORS.to(lengths)[best[..., 0]] * box.exp()


def counting_loss(
    prediction: Prediction, classes: torch.Tensor, boxes: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute cross-entropy of the classes plus BOX_WEIGHT times smooth L1 of the boxes, summed over both sides.

    Boxes of negative anchors count in the mean but have no gradient: their targets are the detached predictions.

    Returns:
        the loss, and its terms for the log.
    """
    class_losses, box_losses = [], []
    for side in range(2):
        logits, wanted = prediction.logits[:, side].float().flatten(0, 1), classes[:, side].flatten()
        known = (wanted >= 0).sum().clamp(min=1)
        class_losses.append(F.cross_entropy(logits, wanted, ignore_index=-1, reduction="sum") / known)
        found = prediction.boxes[:, side].float()
        box_losses.append(F.smooth_l1_loss(found, torch.where(classes[:, side] == 1, boxes[:, side], found.detach())))
    class_loss, box_loss = torch.stack(class_losses).sum(), torch.stack(box_losses).sum()
    return class_loss + BOX_WEIGHT * box_loss, {"class_loss": class_loss.detach(), "box_loss": box_loss.detach()}


# Windows and network --------------------------------------------------------------------------------------------


def window_frames(
    moments: torch.Tensor, lengths: torch.Tensor, total: torch.Tensor | int, num_frames: int
) -> torch.Tensor:
    """Compute frame indices of the windows on both sides, int ``[B, 2, T]``; -1 outside the segment.

    Each window is twice as long as the guess, so that the largest anchor fits: T evenly spaced frames from
    m - 2·length + 1 to m, and from m + 1 to m + 2·length. `total`: frames of each segment ``[B]``, or of all.
    """
    share = torch.linspace(0, 1, num_frames)
    before = moments[:, None] - (2 * lengths[:, :1] - 1) * (1 - share)
    after = moments[:, None] + 1 + (2 * lengths[:, 1:] - 1) * share
    frames = torch.stack([before, after], dim=1).round().long()
    return frames.masked_fill((frames < 0) | (frames >= torch.as_tensor(total)[..., None, None]), -1)


def take_frames(frames: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Take frames ``[..., H, W, 3]`` of a segment uint8 ``[F, H, W, 3]`` by index; MEAN_COLOUR where it is -1."""
    windows = frames[index.clamp(min=0)]
    windows[index < 0] = MEAN_COLOUR
    return windows


class CountingHead(nn.Module):
    """Four linear layers on the features of both windows, ``[B, W]`` → Prediction."""

    def __init__(self, width: int):
        super().__init__()
        anchors = len(ANCHORS)
        self.cls_1, self.cls_2 = nn.Linear(width, 2 * anchors), nn.Linear(width, 2 * anchors)
        self.box_1, self.box_2 = nn.Linear(width, anchors), nn.Linear(width, anchors)
        for layer in (self.cls_1, self.cls_2, self.box_1, self.box_2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, features: torch.Tensor) -> Prediction:
        logits = torch.stack([self.cls_1(features), self.cls_2(features)], dim=1)
        boxes = torch.stack([self.box_1(features), self.box_2(features)], dim=1)
        return Prediction(rearrange(logits, "b s (a k) -> b s a k", k=2), boxes)


class RepetitionCounter(nn.Module):
    """An encoder without classifier, applied to both windows, and the head on its pooled features."""

    def __init__(self, encoder: VisionTransformer):
        super().__init__()
        self.encoder, self.head = encoder, CountingHead(2 * encoder.embed_dim)

    def forward(self, windows: torch.Tensor) -> Prediction:
        """uint8 ``[B, 2, T, H, W, 3]`` → Prediction."""
        clips = rearrange(windows, "b s t h w c -> (b s) c t h w")
        features = self.encoder(normalize_clips(clips, *channel_stats("imagenet", clips.device)))
        return self.head(rearrange(features, "(b s) d -> b (s d)", s=2))


# Training -------------------------------------------------------------------------------------------------------


class Walks:
    """State of the iterative refinement of a batch of segments.

    In each step the head corrects the lengths, and the moments move on, so that training sees the same guesses as
    counting. Half of the segments start with a first guess as in counting, the others near the true length. A guess
    without a positive anchor has no target; it is replaced by the true length times a factor drawn in advance.

    Args:
        segments: (frames uint8 ``[F, H, W, 3]``, boundaries of its cycles ``[C + 1]``) of B segments.
        steps: number of refinement steps, R.
    """

    def __init__(self, segments: list[tuple[np.ndarray, np.ndarray]], rngs: list[np.random.Generator], steps: int):
        self.frames = [torch.from_numpy(frames) for frames, _ in segments]
        self.offsets = [cycle_offsets(torch.from_numpy(bounds)) for _, bounds in segments]
        self.totals = torch.tensor([len(frames) for frames in self.frames])  # [B]
        limit = -math.log(MIN_IOU)
        factors = np.stack([np.exp(rng.uniform(-limit, limit, (steps + 1, 2))) for rng in rngs])
        guesses = []
        for (frames, bounds), rng in zip(segments, rngs):
            share = rng.uniform(*START_SCALES[:2])
            guesses.append(share * len(frames) if rng.random() < 0.5 else 1 + np.diff(bounds).mean())
        first = torch.from_numpy(factors[:, steps] * np.array(guesses)[:, None]).float()
        self.lengths = within(first, self.totals)  # [B, 2]
        self.restarts = torch.from_numpy(factors[:, :steps]).float()  # [B, R, 2]
        self.moments = torch.tensor([int(rng.integers(total)) for rng, total in zip(rngs, self.totals.tolist())])
        shares = torch.tensor([int(rng.integers(*STRIDE_SHARES)) for rng in rngs])
        self.strides = (self.totals // shares).clamp(min=1)
        self.step = 0

    def windows(self, num_frames: int) -> torch.Tensor:
        """Take the current windows, uint8 ``[B, 2, T, H, W, 3]``."""
        index = window_frames(self.moments, self.lengths, self.totals, num_frames)
        return torch.stack([take_frames(frames, i) for frames, i in zip(self.frames, index)])

    def targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the targets of the current windows; see anchor_targets."""
        return anchor_targets(self.truth(), self.lengths)

    def truth(self) -> torch.Tensor:
        """Return the true offsets at the moments, ``[B, 2]``."""
        return torch.stack([offsets[moment] for offsets, moment in zip(self.offsets, self.moments.tolist())])

    def move(self, lengths: torch.Tensor) -> None:
        """Take the `lengths` that the head predicted, and move to the next moments (cyclically)."""
        self.moments = (self.moments + self.strides) % self.totals
        self.lengths = within(lengths, self.totals)
        lost = (self.targets()[0] == 0).all(dim=-1)
        self.lengths = torch.where(lost, (self.truth() + 1) * self.restarts[:, self.step], self.lengths)
        self.step += 1


# Counting -------------------------------------------------------------------------------------------------------


def within(lengths: torch.Tensor, total: torch.Tensor | int) -> torch.Tensor:
    """Clamp lengths ``[B, 2]`` to what is possible in segments of `total` frames with at least MIN_CYCLES cycles."""
    return lengths.clamp(min=MIN_LENGTH).clamp(max=(torch.as_tensor(total)[..., None] - 1) / MIN_CYCLES + 1)


def agree(moments: torch.Tensor, lengths: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace the length of a side that has no whole cycle in the segment by that of the side with more room.

    Returns:
        lengths ``[M, 2]``, and whether each side has a whole cycle, bool ``[M, 2]``.
    """
    room = torch.stack([moments, total - 1 - moments], dim=1)
    roomy = room.argmax(dim=1, keepdim=True)
    trusted = lengths.gather(1, roomy)
    inside = (room >= trusted).scatter(1, roomy, True)  # one frame more, to reach the same phase
    return torch.where(inside, lengths, trusted), inside


def count_cycles(predict: Callable[[torch.Tensor, torch.Tensor], Prediction], total: int) -> float:
    """Count the cycles of a segment of `total` frames, not rounded.

    Works from coarse to fine: the best of 30 first guesses in the middle, then more and more moments, each starting
    from the lengths of the nearest moment of the previous level. The count is the mean frequency times the duration: C
    cycles of p frames span C·p + 1 frames.

    Args:
        predict: moments int ``[M]``, lengths ``[M, 2]`` → the head's Prediction for these windows, on the CPU.
    """
    middle = torch.tensor([total // 2])
    guesses = within(torch.linspace(*START_SCALES)[:, None].expand(-1, 2) * total, total)
    first = predict(middle.expand(len(guesses)), guesses)
    near = first.logits.float().softmax(dim=-1)[:, :, MIDDLE, 1].mean(dim=1)
    lengths = guesses[near.argmax()][None]
    for level, (num, corrections) in enumerate(LEVELS):
        moments = ((torch.arange(num) + 0.5) * total / num).long()
        lengths = lengths[torch.arange(num) * len(lengths) // num]
        for _ in range(corrections):
            new = decode(predict(moments, lengths), lengths)
            lengths = MERGE * new + (1 - MERGE) * lengths if level == 0 else new
            lengths, inside = agree(moments, within(lengths, total), total)
    frequency = (inside / (lengths - 1)).sum(dim=1) / inside.sum(dim=1)
    return float(frequency.mean()) * (total - 1)


def counting_scores(counts: list[float], truth: list[int]) -> dict[str, float]:
    """Compute ``mae``, mean of |round(count) - truth| / truth, and ``obo``, fraction of errors of at most one."""
    errors = [abs(math.floor(count + 0.5) - true) for count, true in zip(counts, truth)]
    return {
        "mae": sum(error / true for error, true in zip(errors, truth)) / len(truth),
        "obo": sum(error <= 1 for error in errors) / len(truth),
    }
