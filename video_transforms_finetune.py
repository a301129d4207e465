"""Augmentation of clips for fine-tuning, and the crops of a test; clips are uint8 ``[T, H, W, 3]``.

Augmentation of batches on the device (erasing, Mixup) is in engine_for_finetuning.py.
"""

import random
from typing import Any

import numpy as np
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import str_to_pil_interp

from video_transforms import resize


def random_resized_box(
    rng: np.random.Generator,
    frame: tuple[int, int],
    area: tuple[float, float] = (0.25, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draw a crop box (x, y, width, height) in `frame` (width, height), as torchvision's RandomResizedCrop.

    Its fraction of the area is uniform in `area`, its aspect ratio log-uniform in `ratio`; after ten draws that do not
    fit, it is the largest centred box within `ratio`.
    """
    width, height = frame
    for _ in range(10):
        target = width * height * rng.uniform(*area)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        w, h = round((target * aspect) ** 0.5), round((target / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1)), w, h
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    return (width - w) // 2, (height - h) // 2, w, h


class TrainAugmentation:
    """RandAugment, random resized crop, flip.

    Args:
        size: side of the output, pixels.
        auto_augment: RandAugment policy of timm; empty for none.
        flip: flip with p = .5 (not on SSv2, where left and right are labels).
        interpolation: of RandAugment's geometric operations.
        min_area: smallest fraction of the frame's area that a crop keeps.
    Raises:
        ValueError: a policy that timm does not know, or an invalid fraction.
    """

    def __init__(
        self, size: int, auto_augment: str, flip: bool, interpolation: str = "bicubic", min_area: float = 0.25
    ):
        if not 0 < min_area <= 1:
            raise ValueError(f"crop_area {min_area}: must be above 0 and at most 1")
        self.size, self.flip, self.area = size, flip, (min_area, 1.0)
        self.rand_augment: Any = None
        if auto_augment:
            options = {"translate_const": int(size * 0.45)}
            if interpolation != "random":  # else timm draws one
                options["interpolation"] = str_to_pil_interp(interpolation)
            try:
                self.rand_augment = rand_augment_transform(auto_augment, options)
            except (AssertionError, ValueError, KeyError) as error:
                raise ValueError(
                    f"aa {auto_augment}: not a RandAugment policy of timm, such as rand-m7-n4-mstd0.5-inc1"
                ) from error

    def __call__(self, rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
        """uint8 ``[T, H, W, 3]`` → ``[T, size, size, 3]``."""
        if self.rand_augment:
            frames = self.same_for_all(int(rng.integers(2**32)), frames)
        x, y, w, h = random_resized_box(rng, frames.shape[2:0:-1], self.area)
        frames = resize(frames[:, y : y + h, x : x + w], self.size, self.size)
        if self.flip and rng.random() < 0.5:
            frames = np.ascontiguousarray(frames[:, :, ::-1])
        return frames

    def same_for_all(self, seed: int, frames: np.ndarray) -> np.ndarray:
        """Apply RandAugment alike to all frames: timm draws from the global generators, which are seeded for each."""
        out = []
        for frame in frames:
            random.seed(seed)
            np.random.seed(seed)
            out.append(np.asarray(self.rand_augment(Image.fromarray(frame))))
        return np.stack(out)


def short_side_resize(frames: np.ndarray, side: int) -> np.ndarray:
    """Resize the short side of frames uint8 ``[T, H, W, 3]`` to `side`."""
    height, width = frames.shape[1:3]
    if height < width:
        return resize(frames, side, int(width * side / height))
    return resize(frames, int(height * side / width), side)


def long_side_crop(frames: np.ndarray, side: int, crop: int, crops: int) -> np.ndarray:
    """Crop square number `crop` of `crops`, spaced evenly along the long side; a single one is the centre.

    Args:
        frames: uint8 ``[T, H, W, 3]``; along the short side the crop is central.
    """
    height, width = frames.shape[1:3]
    spare = max(height, width) - side
    along = spare // 2 if crops == 1 else int(crop * spare / (crops - 1))
    across = (min(height, width) - side) // 2
    y, x = (along, across) if height > width else (across, along)
    return frames[:, y : y + side, x : x + side]
