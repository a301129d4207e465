"""Crops of whole clips, uint8 ``[T, H, W, 3]`` in and out. The same crop holds for every frame of a clip.

Which frames a clip has is decided in datasets.py.
"""

import numpy as np
import torch
import torch.nn.functional as F

CROP_SCALES = (1, 0.875, 0.75, 0.66)  # of the short side (TSN's multi-scale crop)


def resize(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, antialiased when shrinking, uint8 ``[T, H, W, 3]`` → ``[T, height, width, 3]``."""
    images = torch.from_numpy(frames).permute(0, 3, 1, 2)
    if images.shape[-2:] != (height, width):
        images = F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


def multi_scale_box(rng: np.random.Generator, frame: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A crop box (x, y, width, height) for pretraining.

    Sides are drawn from CROP_SCALES times the short side, width and height at most one scale apart; a side within
    3 px of the output is the output's. The position is one of 13: corners, centre, edge midpoints, quarter points.

    Args:
        frame: (width, height) of the video.
        size: (width, height) of the output.
    """
    short = min(frame)
    sides = [int(short * scale) for scale in CROP_SCALES]
    widths, heights = ([min(out if abs(side - out) < 3 else side, short) for side in sides] for out in size)
    shapes = [(w, h) for i, w in enumerate(widths) for j, h in enumerate(heights) if abs(i - j) <= 1]
    w, h = shapes[rng.integers(len(shapes))]
    anchors = [(i, j) for i in (0, 2, 4) for j in (0, 2, 4)] + [(i, j) for i in (1, 3) for j in (1, 3)]
    i, j = anchors[rng.integers(len(anchors))]
    return i * ((frame[0] - w) // 4), j * ((frame[1] - h) // 4), w, h


def multi_scale_crop(rng: np.random.Generator, frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crop a random multi_scale_box and resize it to `size` (width, height). Always a copy of `frames`."""
    x, y, w, h = multi_scale_box(rng, frames.shape[2:0:-1], size)
    crop = frames[:, y : y + h, x : x + w]
    return crop.copy() if (w, h) == size else resize(crop, size[1], size[0])
