"""Objects that move over a clip: what is pasted, where it goes, and the pasting itself.

`ObjectLibrary` opens RGBA cut-outs; `key_frame_curve`, `gaussian_path` and `linear_path` draw smooth motion;
`ObjectOverlay` pastes the objects and returns their boxes ``[K, T, 4]`` (x1, y1, x2, y2 in pixels), which
masking_generator.py follows. Constants are for frames of 224 pixels (as in the paper) and scale with the short side.
"""

import os
import struct
import zlib
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from glob import glob
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps
from scipy.ndimage import gaussian_filter1d

from lists import read_text
from shards import ShardError, names_below, opened, problem_of, split

REFERENCE_SIZE = 224  # pixels; the frame size all constants below are given for
SCALES = (32, 48, 56, 64, 96, 128)  # side of a box
ASPECT_RATIOS = (0.5, 0.67, 0.75, 1.0, 1.33, 1.5, 2.0)  # width / height
SIZE_JITTER = 0.18  # of log width and log height
SIZE_RATE, ANGLE_RATE, SHIFT_RATE = 0.025, 6.0, 12.0  # change per frame: log size, degrees, pixels
PATH_POINTS, PATH_SIGMA, PATH_EXTENT = 48, 8.0, (40, 180)  # gaussian motion
CACHED_OBJECTS = 384  # images in memory: of 320 pixels a side 150 MiB
IMAGE_SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
IMAGE_ERRORS = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def find_objects(objects_path: str, objects_list: str | None = None) -> list[str]:
    """Find object images ``<category>/<name>``, relative to `objects_path`, sorted.

    Args:
        objects_path: a folder, or a tar file with its index beside it (shards.py), or a folder in a tar file.
        objects_list: optional text file with one such relative path per line; narrows the search to these.
    Raises:
        ValueError: no such folder, nothing found, or a listed path that leaves the folder.
    """
    try:
        names = names_below(objects_path) if split(os.path.join(objects_path, "")) else None
    except ShardError as error:
        raise ValueError(f"objects_path {objects_path}: {error}") from error
    if names is None and not os.path.isdir(objects_path):
        raise ValueError(f"objects_path {objects_path}: no such folder (expected <category>/<name>.png below it)")
    source = f"objects_list {objects_list}" if objects_list else f"objects_path {objects_path}"
    if objects_list:
        try:
            found = [line.strip() for line in read_text(objects_list).splitlines() if line.strip()]
        except ValueError as error:
            raise ValueError(f"objects_list {error}") from error
        if outside := [name for name in found if os.path.isabs(name) or ".." in Path(name).parts]:
            raise ValueError(f"{source}: {outside[0]!r} leaves the objects folder")
        if found and all(problem_of(os.path.join(objects_path, name)) for name in found[:100]):
            raise ValueError(f"{source}: no {found[0]} in {objects_path}, nor the other first 100")
    else:
        names = glob("*/*", root_dir=objects_path, include_hidden=True) if names is None else names
        found = [name for name in names if name.count("/") == 1 and name.lower().endswith(IMAGE_SUFFIXES)]
    if not found:
        raise ValueError(f"{source}: no object images (expected <category>/<name>.png)")
    return sorted(found)


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says, if that can be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data fail in many ways, and say nothing about the pixels
        return image


def to_rgba(image: Image.Image) -> Image.Image:
    """Convert to RGBA of 8 bits."""
    if image.mode.startswith("I"):  # 16 bit grey, which PIL would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGBA")


def read_image(path: str) -> np.ndarray:
    """Open an image, upright, as RGBA with premultiplied alpha, uint8 ``[h, w, 4]``; one without alpha is opaque.

    Raises:
        IMAGE_ERRORS: unreadable, or too large.
    """
    with opened(path) as source, Image.open(source) as file:
        if file.width * file.height > (Image.MAX_IMAGE_PIXELS or 1 << 27):
            raise ValueError(f"{file.width} x {file.height} pixels: too large")
        return np.array(to_rgba(upright(file)).convert("RGBa"))


def read_object(path: str, max_side: int) -> np.ndarray:
    """Open an object with read_image, shrunk to at most `max_side` pixels a side.

    Premultiplied colours keep what lies under transparent pixels from bleeding into the edges.

    Raises:
        IMAGE_ERRORS: unreadable, or fully transparent.
    """
    pixels = read_image(path)
    if not pixels[..., 3].any():
        raise ValueError("fully transparent")
    shrink = max_side / max(pixels.shape[:2])
    if shrink < 1:
        size = [max(1, round(side * shrink)) for side in pixels.shape[1::-1]]
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return pixels


cached_object = lru_cache(CACHED_OBJECTS)(read_object)  # of each loader worker


class ObjectLibrary:
    """Random objects from a list of images; those that cannot be used are skipped, and noted in `skipped`.

    Args:
        names: image paths relative to `root`, from find_objects.
        max_side: longest side kept in memory, pixels.
    Attributes:
        skipped: path → reason of the images that cannot be used.
    """

    def __init__(self, root: str, names: list[str], max_side: int = 320):
        self.root, self.names, self.max_side = root, names, max_side
        self.skipped: dict[str, str] = {}
        self._reported = 0

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw a usable object, uint8 ``[h, w, 4]`` premultiplied RGBA; it may be cached, so do not write to it.

        Raises:
            RuntimeError: 100 draws in a row were unusable.
        """
        for _ in range(100):
            path = os.path.join(self.root, self.names[int(rng.integers(len(self.names)))])
            if path not in self.skipped:
                try:
                    return cached_object(path, self.max_side)
                except IMAGE_ERRORS as error:
                    self.skipped[path] = str(error) or type(error).__name__
        path, reason = next(iter(self.skipped.items()))
        raise RuntimeError(f"objects_path {self.root}: 100 unusable images in a row, among them {path}: {reason}")

    def take_skipped(self) -> list[tuple[str, str]]:
        """Return (path, reason) of the images skipped since the last call."""
        new = list(self.skipped.items())[self._reported :]
        self._reported = len(self.skipped)
        return new


def pick(rng: np.random.Generator, options: Sequence, probabilities: tuple[float, ...]) -> Any:
    """Draw one of `options`, like Generator.choice, but without its 20 microseconds of set-up."""
    return options[bisect(list(accumulate(probabilities[:-1])), rng.random())]


def key_frames(rng: np.random.Generator, num_frames: int) -> list[int]:
    """Draw key frames: the first, the last, and 0 / 1 / 2 jittered ones between (p = .5 / .3 / .2)."""
    inner = pick(rng, (0, 1, 2), (0.5, 0.3, 0.2))
    spacing = (num_frames - 1) / (inner + 1)
    between = [round(spacing * (i + rng.uniform(-1 / 3, 1 / 3))) for i in range(1, inner + 1)]
    return sorted({0, *between, num_frames - 1})


def key_frame_curve(
    rng: np.random.Generator, num_frames: int, start: np.ndarray, step: Callable[[np.ndarray, int], np.ndarray]
) -> np.ndarray:
    """Draw a curve ``[T, D]`` between key frames: linear (p .7), accelerating or decelerating (.15 each).

    Args:
        start: value at frame 0, ``[D]``.
        step: (value at a key frame, number of frames to the next one) → value at the next one.
    """
    values = np.empty((num_frames, len(start)))
    values[0] = start
    for a, b in pairwise(key_frames(rng, num_frames)):
        end = step(values[a], b - a)
        t = np.arange(b - a + 1)[:, None] / (b - a)
        progress = pick(rng, (t, t**2, 1 - (1 - t) ** 2), (0.7, 0.15, 0.15))
        values[a : b + 1] = values[a] + (end - values[a]) * progress
    return values


def gaussian_path(
    rng: np.random.Generator, num_frames: int, size: np.ndarray, frame: tuple[int, int], unit: float = 1.0
) -> np.ndarray:
    """Draw smoothed random points, stretched to a random extent, somewhere in the frame.

    Args:
        size: unused; see linear_path.
        frame: (W, H), pixels.
        unit: factor on distances, which are given for frames of 224 pixels.
    Returns:
        box centres, whole pixels as float, ``[T, 2]``.
    """
    limits = np.asarray(frame)
    smooth = gaussian_filter1d(rng.random((PATH_POINTS, 2)), PATH_SIGMA, axis=0)
    smooth = (smooth - smooth.min(axis=0)) / np.ptp(smooth, axis=0)
    least, most = (int(side * unit) for side in PATH_EXTENT)
    extent = min(int(rng.integers(least, max(most, least + 1))), min(frame) - 1)
    path = smooth * extent + rng.integers(0, limits - extent)
    every = np.arange(num_frames) * (PATH_POINTS - 1) // max(1, num_frames - 1)
    return np.trunc(path[every].clip(0, limits - 1))


def linear_path(
    rng: np.random.Generator, num_frames: int, size: np.ndarray, frame: tuple[int, int], unit: float = 1.0
) -> np.ndarray:
    """Draw box centres that start anywhere in the frame and drift between key frames; see gaussian_path."""
    low, high = size / 2, np.asarray(frame) - size / 2

    def drift(centre: np.ndarray, frames: int) -> np.ndarray:
        reach = SHIFT_RATE * unit * frames
        return np.clip(centre + rng.uniform(-reach, reach, 2), low, high)

    return key_frame_curve(rng, num_frames, rng.uniform(low, high), drift)


MOTION_TYPES = {"gaussian": gaussian_path, "linear": linear_path}


def shaped_patch(rng: np.random.Generator, frames: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Cut a patch out of the clip: rectangle, ellipse or rhombus (p .5 / .35 / .15), half of them with soft edges.

    Args:
        frames: uint8 ``[T, H, W, 3]``.
        size: (w, h), pixels.
    Returns:
        uint8 ``[h, w, 4]`` premultiplied RGBA.
    """
    num_frames, height, width, _ = frames.shape
    w, h = np.rint(size).astype(int).clip(1, (width, height))
    x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
    patch = frames[rng.integers(num_frames), y : y + h, x : x + w]
    across = np.abs((np.arange(w) + 0.5) / w * 2 - 1)[None]  # 0 in the middle, 1 at the edge
    down = np.abs((np.arange(h) + 0.5) / h * 2 - 1)[:, None]
    shapes = np.maximum(across, down), np.hypot(across, down), across + down
    distance = pick(rng, shapes, (0.5, 0.35, 0.15))
    alpha = (distance <= 1).astype(np.float32)
    if rng.random() < 0.5:
        alpha = ((1 - distance) / (1 - rng.uniform(0.30, 0.45))).clip(0, 1)
    alpha = alpha[..., None]
    return np.rint(np.concatenate([patch * alpha, 255 * alpha], axis=2)).astype(np.uint8)


def paste(
    frames: np.ndarray, sprite: np.ndarray, boxes: np.ndarray, angles: np.ndarray, opacity: np.ndarray | None = None
) -> None:
    """Paste `sprite` on every frame, in place: stretched to its box, rotated about its centre, cut at the edge.

    Args:
        frames: uint8 ``[T, H, W, 3]``.
        sprite: uint8 ``[h, w, 4]`` premultiplied RGBA.
        boxes: int ``[T, 4]`` x1, y1, x2, y2.
        angles: degrees, clockwise, ``[T]``.
        opacity: optional factor in [0, 1], ``[T]``.
    """
    canvases, matrices = _placement(boxes, angles, sprite.shape[1::-1], frames.shape[2:0:-1])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    for t, ((left, top, right, bottom), matrix) in enumerate(zip(canvases.tolist(), matrices)):
        if left >= right or top >= bottom:  # wholly outside
            continue
        drawn = cv2.warpAffine(sprite, matrix, (right - left, bottom - top), flags=flags)
        if opacity is not None:
            drawn = cv2.convertScaleAbs(drawn, alpha=float(opacity[t]))
        below = frames[t, top:bottom, left:right]
        through = cv2.cvtColor(cv2.bitwise_not(cv2.extractChannel(drawn, 3)), cv2.COLOR_GRAY2RGB)
        cv2.add(cv2.cvtColor(drawn, cv2.COLOR_RGBA2RGB), cv2.multiply(below, through, scale=1 / 255), dst=below)


def _placement(
    boxes: np.ndarray, angles: np.ndarray, sprite: tuple[int, int], frame: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the frame's regions that hold rotated boxes, ``[T, 4]``, and affine maps region → sprite, ``[T, 2, 3]``.

    `sprite` and `frame` are (width, height).
    """
    size, centre = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
    cos, sin = np.cos(np.deg2rad(angles)), np.sin(np.deg2rad(angles))
    turn = np.stack([np.stack([cos, sin], axis=1), np.stack([-sin, cos], axis=1)], axis=1)  # turns back
    reach = (np.abs(turn) @ size[:, :, None])[..., 0] / 2 - 1e-6
    low = np.floor(centre - reach).clip(0).astype(int)
    high = np.minimum(np.ceil(centre + reach), frame).astype(int)
    # To the box centre, turn back, scale to the sprite; pixel centres lie at .5.
    turn = turn * (np.array(sprite) / size)[:, :, None]
    shift = turn @ (low + 0.5 - centre)[:, :, None] + (np.array(sprite)[:, None] / 2 - 0.5)
    return np.concatenate([low, high], axis=1), np.concatenate([turn, shift], axis=2)


@dataclass(eq=False)
class ObjectOverlay:
    """Pastes moving objects on clips.

    Args:
        frame: (W, H) of the clips, pixels.
        library: source of the objects; None cuts patches out of the clip itself.
        motion: one of MOTION_TYPES; SMILE uses ``gaussian``.
        scales: box sides at 224 pixels.
        num_rois: objects per clip, K.
        speed: factor on movement, rotation and growth; 0: objects stand still.
    Raises:
        ValueError: unknown motion, no objects, or objects without size.
    """

    frame: tuple[int, int]
    library: ObjectLibrary | None
    motion: str = "gaussian"
    scales: tuple[int, ...] = SCALES
    num_rois: int = 2
    speed: float = 1.0

    def __post_init__(self):
        if self.motion not in MOTION_TYPES:
            raise ValueError(f"unknown motion_type {self.motion!r}, choose from {tuple(MOTION_TYPES)}")
        if self.num_rois < 1 or min(self.scales) < 1:
            raise ValueError(f"num_rois {self.num_rois} and the smallest of scales {self.scales} must be at least 1")
        self.unit = min(self.frame) / REFERENCE_SIZE

    def __call__(self, rng: np.random.Generator, frames: np.ndarray) -> np.ndarray:
        """Draw K objects with their motion and paste them on frames uint8 ``[T, H, W, 3]``, **in place**.

        Returns:
            boxes int ``[K, T, 4]`` in the order of pasting, larger objects first.
        """
        tracks = [self.draw_track(rng, len(frames)) for _ in range(self.num_rois)]
        tracks.sort(key=lambda track: -np.prod(track[0][:, 2:] - track[0][:, :2], axis=1).mean())
        sprites = [self.draw_sprite(rng, frames, boxes) for boxes, _ in tracks]  # all before the first is pasted
        for (boxes, angles), (sprite, opacity) in zip(tracks, sprites):
            paste(frames, sprite, boxes, angles, opacity)
        return np.stack([boxes for boxes, _ in tracks])

    def draw_sprite(
        self, rng: np.random.Generator, frames: np.ndarray, boxes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Draw an object, or a patch of the clip with its opacity ``[T]`` (a curve between .8 and 1)."""
        sizes = boxes[:, 2:] - boxes[:, :2]
        if self.library:
            return fit_sprite(self.library.draw(rng), sizes.max(axis=0)), None
        sprite = fit_sprite(shaped_patch(rng, frames, sizes[0]), sizes.max(axis=0))
        start = np.array([rng.uniform(0.8, 1)])
        return sprite, key_frame_curve(rng, len(frames), start, lambda *_: rng.uniform(0.8, 1, 1))[:, 0]

    def draw_track(self, rng: np.random.Generator, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw one object's boxes int ``[T, 4]`` and angles in whole degrees, int ``[T]``."""
        ratio, scale = (values[rng.integers(len(values))] for values in (ASPECT_RATIOS, self.scales))
        size = scale * self.unit * np.array([ratio**0.5, ratio**-0.5])
        size = size * np.exp(rng.uniform(-SIZE_JITTER, SIZE_JITTER, 2))
        size = size.clip(1, np.array(self.frame) - 1)

        def change(rate: float, frames: int, dims: int) -> np.ndarray:
            reach = rate * self.speed * frames
            return rng.uniform(-reach, reach, dims)

        centres = MOTION_TYPES[self.motion](rng, num_frames, size, self.frame, self.unit * self.speed)
        grow = lambda value, frames: value * np.exp(change(SIZE_RATE, frames, 2))
        sizes = key_frame_curve(rng, num_frames, size, grow)
        turn = lambda value, frames: value + change(ANGLE_RATE, frames, 1)
        angles = key_frame_curve(rng, num_frames, np.zeros(1), turn)[:, 0]
        low, high = np.rint(centres - sizes / 2), np.rint(centres + sizes / 2)
        return np.concatenate([low, np.maximum(high, low + 1)], axis=1).astype(int), angles.astype(int)


def fit_sprite(sprite: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Resize a sprite to less than twice its largest box (w, h), so that one bilinear warp a frame is enough.

    A smaller side is enlarged, as the warp would smear its edge beyond the box.
    """
    w, h = (int(side) for side in size)
    while (wide := sprite.shape[1] >= 2 * w) | (tall := sprite.shape[0] >= 2 * h):
        halved = (sprite.shape[1] >> wide, sprite.shape[0] >> tall)  # many times faster than other factors
        sprite = cv2.resize(sprite, halved, interpolation=cv2.INTER_AREA)
    if w <= sprite.shape[1] and h <= sprite.shape[0]:
        return sprite
    return cv2.resize(sprite, (max(w, sprite.shape[1]), max(h, sprite.shape[0])), interpolation=cv2.INTER_LINEAR)
