"""Base clips of pretraining, before objects are pasted: sampling of frames, sources other than videos, and the crop.

Clips are uint8 ``[T, H, W, 3]``; all frames of a clip are cropped alike.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from object_overlay import IMAGE_ERRORS, read_image
from utils import first_line
from video_reader import Clip, VideoError, read_clip

BACKGROUNDS = ("video", "black", "noise", "image", "frame")
IMAGE_SHARE = 8 / 7  # images are shrunk to this short side, relative to the clip's: 256 pixels for clips of 224
CROP_SCALES = (1, 0.875, 0.75, 0.66)  # of the short side (TSN's multi-scale crop)


# Sampling and crop ----------------------------------------------------------------------------------------------


def pretrain_indices(rng: np.random.Generator, total: int, num_frames: int, stride: int) -> np.ndarray:
    """Draw frames ``[T]``, `stride` apart from a random start; a shorter video repeats its last reachable frame."""
    start = rng.integers(0, max(total - num_frames * stride, 0) + 1)
    last = (total - 1 - start) // stride
    return start + stride * np.minimum(np.arange(num_frames), last)


def resize(frames: np.ndarray, height: int, width: int, out: np.ndarray | None = None) -> np.ndarray:
    """Resize bilinearly, antialiased when shrinking: uint8 ``[T, H, W, 3]`` → ``[T, height, width, 3]``, into `out`.

    Works frame by frame, so that a frame and its intermediate result stay in the processor's cache.
    """
    out = np.empty((len(frames), height, width, 3), np.uint8) if out is None else out
    grows = height >= frames.shape[1] and width >= frames.shape[2]
    for frame, resized in zip(frames, out):
        if grows:  # without antialiasing both give the same, and OpenCV is faster
            cv2.resize(frame, (width, height), dst=resized, interpolation=cv2.INTER_LINEAR)
        else:
            image = torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]
            image = F.interpolate(image, (height, width), mode="bilinear", antialias=True)
            resized[:] = image[0].permute(1, 2, 0).numpy()
    return out


def multi_scale_box(
    rng: np.random.Generator, frame: tuple[int, int], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Draw a crop box (x, y, width, height).

    Sides are drawn from CROP_SCALES times the short side, width and height at most one scale apart; a side that
    differs from the output's by 1 or 2 px is set to it. The position is one of 13: corners, centre, edge midpoints,
    quarter points.

    Args:
        frame: (width, height) of the video.
        size: (width, height) of the output.
    """
    short = min(frame)
    sides = [max(1, int(short * scale)) for scale in CROP_SCALES]
    widths, heights = ([min(out if abs(side - out) < 3 else side, short) for side in sides] for out in size)
    shapes = [(w, h) for i, w in enumerate(widths) for j, h in enumerate(heights) if abs(i - j) <= 1]
    w, h = shapes[rng.integers(len(shapes))]
    anchors = [(i, j) for i in (0, 2, 4) for j in (0, 2, 4)] + [(i, j) for i in (1, 3) for j in (1, 3)]
    i, j = anchors[rng.integers(len(anchors))]
    return i * ((frame[0] - w) // 4), j * ((frame[1] - h) // 4), w, h


# Sources of clips -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipSource:
    """Source of the base clip: video, still image, noise or black.

    Args:
        size: (width, height) of the clips, pixels.
        stride: frames of a video from one to the next frame of a clip.
        kind: one of BACKGROUNDS: a window of a video, black, uniform noise, an image, one frame of a video.
        pan: distance that an image or frame moves in a clip, relative to its short side.
    """

    size: tuple[int, int]
    num_frames: int
    stride: int = 1
    kind: str = "video"
    pan: float = 0.0
    reader: str = "pyav"

    def read(self, rng: np.random.Generator, path: str) -> Clip:
        """Read T frames of any size; for black and noise nothing is read. Raises VideoError if unreadable."""
        if self.kind == "video":
            choose = lambda total: pretrain_indices(rng, total, self.num_frames, self.stride)
            return read_clip(path, choose, self.reader)
        if self.kind == "frame":  # the middle one, in every epoch
            found = read_clip(path, lambda total: np.full(self.num_frames, total // 2), self.reader)
            return found._replace(frames=pan_window(rng, found.frames[0], self.num_frames, self.pan))
        side = round(max(self.size) * IMAGE_SHARE)
        picture = read_picture(path, side) if self.kind == "image" else np.zeros((16, 16, 3), np.uint8)
        numbers = np.arange(self.num_frames)
        return Clip(pan_window(rng, picture, self.num_frames, self.pan), numbers, np.full(len(numbers), np.nan))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape (T, H, W, 3) of a clip."""
        return self.num_frames, *self.size[::-1], 3

    def crop(self, rng: np.random.Generator, frames: np.ndarray, clip: np.ndarray) -> None:
        """Crop a multi_scale_box of frames, into `clip` uint8 ``[T, H, W, 3]``; noise is drawn instead."""
        if self.kind == "noise":
            clip[:] = rng.integers(0, 256, clip.shape[1:], np.uint8)  # not resized, as that would smooth it
            return
        x, y, w, h = multi_scale_box(rng, frames.shape[2:0:-1], self.size)
        resize(frames[:, y : y + h, x : x + w], *self.size[::-1], clip)


def read_picture(path: str, side: int) -> np.ndarray:
    """Read an image, uint8 ``[H, W, 3]``, shrunk to a short side of at most `side`. Raises VideoError if unreadable."""
    try:
        picture = np.ascontiguousarray(read_image(path)[..., :3])
    except IMAGE_ERRORS as error:
        raise VideoError(first_line(error).replace(path, "it")) from error
    shrink = min(1, side / min(picture.shape[:2]))
    height, width = (round(length * shrink) for length in picture.shape[:2])
    return picture if shrink == 1 else resize(picture[None], height, width)[0]


def pan_window(rng: np.random.Generator, picture: np.ndarray, num_frames: int, pan: float) -> np.ndarray:
    """Move a window over a picture at constant speed in a random direction, by `pan` of its short side in all.

    Returns:
        uint8 ``[T, h, w, 3]``, the largest windows that fit in ``[H, W, 3]``: the whole picture if `pan` is 0.
    """
    angle = rng.uniform(0, 2 * np.pi)
    reach = pan * min(picture.shape[:2]) * np.array([np.sin(angle), np.cos(angle)])  # down, right
    size = np.array(picture.shape[:2])
    height, width = window = np.maximum(1, size - np.ceil(abs(reach)).astype(int))
    moved = np.rint(np.linspace(0, 1, num_frames)[:, None] * reach - np.minimum(reach, 0)).astype(int)
    moved = np.minimum(moved, size - window)  # a single row or column does not move
    return np.stack([picture[y : y + height, x : x + width] for y, x in moved])
