"""Counting repetitions: a head that finds the cycle before and the cycle after a moment, and the count made of them.

After Zhang et al., Context-aware and scale-insensitive temporal repetition counting (CVPR 2020). No files here, and
no words of the command line; run_repetition_counting.py reads videos and trains.

A *segment* has F frames, numbered from 0. At each *moment* m, one of them, there are two *sides*: 0, the cycle that
ends in m, and 1, the cycle that begins there. The *offset* of a side is the number of frames from m to the same phase
of the neighbouring cycle, its *length* is offset + 1: the frames that the cycle touches, both ends included.

Nobody knows the lengths in the beginning. So the network is shown a window on each side, cut for a guess of the
length, and says for each of seven *anchors*, factors on the guess, whether it comes near the truth, and by how much
the logarithm has to be corrected. The corrected length is the next guess (`decode`).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from modeling_finetune import channel_stats, normalize_clips

ANCHORS = torch.tensor([0.5, 0.67, 0.8, 1.0, 1.25, 1.5, 2.0])
MIDDLE = 3  # the anchor that leaves a guess as it is
NO_NEIGHBOUR = -1.0  # in place of an offset
MIN_IOU = 0.5  # of an anchor with the truth, from which on it is near
BOX_WEIGHT = 50.0
BOX_LIMIT = 0.5  # largest correction of a logarithm that is believed
MIN_LENGTH, MIN_CYCLES = 4.0, 2  # of a cycle, of a segment
START_SCALES = (0.03, 0.35, 30)  # first guesses: from, to (shares of the segment), how many
MERGE = 0.5  # weight of a new length against the guess, while the first one settles
STRIDE_SHARES = (5, 21)  # a walk in training takes a fifth to a twentieth of the segment a step
LEVELS = ((1, 4), (4, 4), (8, 2), (16, 1), (32, 1))  # of the count: moments, corrections
MEAN_COLOUR = (255 * channel_stats("imagenet")[0].flatten()).round().to(torch.uint8)


class Prediction(NamedTuple):
    """What the head says of B windows."""

    logits: torch.Tensor  # [B, 2 sides, 7 anchors, 2 (far, near)]
    boxes: torch.Tensor  # [B, 2, 7], correction of each anchor's logarithm


# Truth ----------------------------------------------------------------------------------------------------------


def cycle_offsets(bounds: torch.Tensor) -> torch.Tensor:
    """Offsets of every frame from the first boundary to the last, float ``[F, 2]``; NO_NEIGHBOUR where there is none.

    A frame's phase is its place between the boundaries around it; the same phase in another cycle lies at the same
    share of that one (linear interpolation). Neighbours that differ by more than 2 frames and by more than a factor
    of 1.3 are no repetition of each other (the rule of UCFRep's annotations).

    Args:
        bounds: frames where a cycle ends and the next one begins, rising, ``[C + 1]``.
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
    """What the head should say of windows cut for a guess.

    Args:
        offsets: true ones at the moments, ``[B, 2]``.
        lengths: the guess, frames, ``[B, 2]``.
    Returns:
        classes int ``[B, 2, 7]``: 1 near, 0 far, -1 nothing to learn (no neighbour); boxes float ``[B, 2, 7]``,
        to be learned where the class is 1.
    """
    ratio = (offsets + 1)[..., None] / (ANCHORS.to(lengths) * lengths[..., None])
    near = torch.minimum(ratio, 1 / ratio) >= MIN_IOU
    unknown = (offsets == NO_NEIGHBOUR)[..., None]
    return near.long().masked_fill(unknown, -1), ratio.masked_fill(unknown, 1.0).log()


def decode(prediction: Prediction, lengths: torch.Tensor) -> torch.Tensor:
    """Lengths ``[B, 2]`` from what the head says of the guess `lengths` ``[B, 2]``: the inverse of anchor_targets.

    The likeliest anchor wins; of equally likely ones that which needs the smallest correction.
    """
    near = prediction.logits.float().softmax(dim=-1)[..., 1]
    boxes = prediction.boxes.float()
    best = (near - 1e-6 * boxes.abs()).argmax(dim=-1, keepdim=True)
    box = boxes.gather(-1, best)[..., 0].clamp(-BOX_LIMIT, BOX_LIMIT)
    return lengths * ANCHORS.to(lengths)[best[..., 0]] * box.exp()


def counting_loss(
    prediction: Prediction, classes: torch.Tensor, boxes: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy of the classes plus BOX_WEIGHT times smooth L1 of the boxes, each summed over both sides.

    Boxes of anchors that are not near are replaced by the prediction itself: they count in the mean and teach nothing.

    Returns:
        the loss, and its parts for the log.
    """
    class_losses, box_losses = [], []
    for side in range(2):
        logits, wanted = prediction.logits[:, side].float().flatten(0, 1), classes[:, side].flatten()
        known = (wanted >= 0).sum().clamp(min=1)
        class_losses.append(F.cross_entropy(logits, wanted, ignore_index=-1, reduction="sum") / known)
        said = prediction.boxes[:, side].float()
        box_losses.append(F.smooth_l1_loss(said, torch.where(classes[:, side] == 1, boxes[:, side], said.detach())))
    class_loss, box_loss = torch.stack(class_losses).sum(), torch.stack(box_losses).sum()
    return class_loss + BOX_WEIGHT * box_loss, {"class_loss": class_loss.detach(), "box_loss": box_loss.detach()}


# Windows and network --------------------------------------------------------------------------------------------


def window_frames(
    moments: torch.Tensor, lengths: torch.Tensor, total: torch.Tensor | int, num_frames: int
) -> torch.Tensor:
    """Frames of the windows on both sides, int ``[B, 2, T]``; -1 where a window hangs over its segment.

    Each window is twice as long as the guess, so that the largest anchor still fits: T frames evenly from
    m - 2·length + 1 to m, and from m + 1 to m + 2·length.

    Args:
        total: frames of the segments, ``[B]``, or of all.
    """
    share = torch.linspace(0, 1, num_frames)
    before = moments[:, None] - (2 * lengths[:, :1] - 1) * (1 - share)
    after = moments[:, None] + 1 + (2 * lengths[:, 1:] - 1) * share
    frames = torch.stack([before, after], dim=1).round().long()
    return frames.masked_fill((frames < 0) | (frames >= torch.as_tensor(total)[..., None, None]), -1)


def take_frames(frames: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Pixels ``[..., H, W, 3]`` of a segment uint8 ``[F, H, W, 3]`` at window_frames; MEAN_COLOUR where it is -1."""
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
    """The encoder on each window, and the head on both.

    The encoder sees a window as a clip of its own, T frames, as in its pretraining.

    Args:
        encoder: normalised ``[B, 3, T, H, W]`` → pooled features ``[B, D]``.
        width: D.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, encoder: nn.Module, width: int):
        super().__init__()
        self.encoder, self.head = encoder, CountingHead(2 * width)
        for name, values in zip(("mean", "std"), channel_stats("imagenet")):
            self.register_buffer(name, values, persistent=False)

    def forward(self, windows: torch.Tensor) -> Prediction:
        """uint8 ``[B, 2, T, H, W, 3]`` → Prediction."""
        clips = rearrange(windows, "b s t h w c -> (b s) c t h w")
        features = self.encoder(normalize_clips(clips, self.mean, self.std))
        return self.head(rearrange(features, "(b s) d -> b (s d)", s=2))


# Training: a walk through a segment -----------------------------------------------------------------------------


class Walks:
    """A batch of training segments on their way: at each step the head corrects the windows, and the moments move on.

    So training meets the guesses that counting will meet: wrong ones first, then the head's own. Half of the walks
    begin with a first guess of a count, the others near the truth. A guess so wrong that no anchor is near would teach
    no more corrections: it is replaced by the truth times a factor, drawn beforehand.

    Args:
        segments: (frames uint8 ``[F, H, W, 3]``, boundaries of its cycles ``[C + 1]``) of B segments.
        rngs: a generator for each.
        steps: corrections that each can make, R.
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
        """uint8 ``[B, 2, T, H, W, 3]``."""
        index = window_frames(self.moments, self.lengths, self.totals, num_frames)
        return torch.stack([take_frames(frames, i) for frames, i in zip(self.frames, index)])

    def targets(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head should say of the windows: anchor_targets."""
        return anchor_targets(self.truth(), self.lengths)

    def truth(self) -> torch.Tensor:
        """Offsets at the moments, ``[B, 2]``."""
        return torch.stack([offsets[moment] for offsets, moment in zip(self.offsets, self.moments.tolist())])

    def move(self, lengths: torch.Tensor) -> None:
        """On to the next moments (after the last frame comes the first), with the `lengths` that the head gave."""
        self.moments = (self.moments + self.strides) % self.totals
        self.lengths = within(lengths, self.totals)
        lost = (self.targets()[0] == 0).all(dim=-1)
        self.lengths = torch.where(lost, (self.truth() + 1) * self.restarts[:, self.step], self.lengths)
        self.step += 1


# Counting -------------------------------------------------------------------------------------------------------


def within(lengths: torch.Tensor, total: torch.Tensor | int) -> torch.Tensor:
    """Lengths ``[B, 2]`` limited to what segments of `total` frames with at least MIN_CYCLES can hold."""
    return lengths.clamp(min=MIN_LENGTH).clamp(max=(torch.as_tensor(total)[..., None] - 1) / MIN_CYCLES + 1)


def agree(moments: torch.Tensor, lengths: torch.Tensor, total: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which sides have a whole cycle within the segment; those that have none take the length of the other side.

    Of at least two cycles one fits on the side with more room, so that this side's length decides for both.

    Returns:
        lengths ``[M, 2]``, bool ``[M, 2]``.
    """
    room = torch.stack([moments, total - 1 - moments], dim=1)
    roomy = room.argmax(dim=1, keepdim=True)
    trusted = lengths.gather(1, roomy)
    inside = (room >= trusted).scatter(1, roomy, True)  # a frame to spare: the last cycle's first frame has no next
    return torch.where(inside, lengths, trusted), inside


def count_cycles(predict: Callable[[torch.Tensor, torch.Tensor], Prediction], total: int) -> float:
    """The number of cycles in a segment, not rounded.

    From coarse to fine: in the middle, the best of 30 first guesses; then more and more moments, each beginning with
    the lengths of the moment nearest to it on the level above. The count is the mean frequency times the duration:
    C cycles of p frames touch C·p + 1 frames.

    Args:
        predict: moments int ``[M]``, lengths ``[M, 2]`` → the head's Prediction for these windows, on the CPU.
        total: frames of the segment.
    """
    middle = torch.tensor([total // 2])
    guesses = within(torch.linspace(*START_SCALES)[:, None].expand(-1, 2) * total, total)
    said = predict(middle.expand(len(guesses)), guesses)
    near = said.logits.float().softmax(dim=-1)[:, :, MIDDLE, 1].mean(dim=1)
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
    """``mae``: mean of |round(count) - truth| / truth; ``obo``: share of counts at most one off."""
    errors = [abs(math.floor(count + 0.5) - true) for count, true in zip(counts, truth)]
    return {
        "mae": sum(error / true for error, true in zip(errors, truth)) / len(truth),
        "obo": sum(error <= 1 for error in errors) / len(truth),
    }
