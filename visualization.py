"""Pictures of clips and of what is known of each token: plain arrays in, pictures and movies out.

A `Row` is one quantity over the time of a clip. `picture` sets rows below each other, one column a time step;
`movie` sets them side by side and lets them run. run_visualization.py brings the arrays. Shapes: T frames of H x W
pixels, a token grid (t, h, w) with N = t·h·w tokens, K objects, D features.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import av
import cv2
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

BOX_COLOURS = ((255, 255, 0), (0, 255, 255), (255, 0, 255), (0, 255, 0))
HIDDEN, UNKNOWN = 40, 217  # grey of hidden pixels, and of tokens that nothing is known of
COLOUR_MAP = matplotlib.colormaps["inferno"].with_extremes(bad=(UNKNOWN / 255,) * 3)
# The layout of a sheet, in pixels: a line of text, between cells, around the sheet, for a colour bar, for the title.
LINE, GAP, MARGIN, BAR_ROOM, TITLE_ROOM = 16, 6, 12, 84, 48
DPI = 100
MAX_COLUMNS = 8


class Scale(NamedTuple):
    """Numbers from `low` to `high` as colours; `label` stands beside the colour bar."""

    low: float
    high: float
    label: str


class Row(NamedTuple):
    """One quantity over time.

    `images` is uint8 ``[n, h, w, 3]``, or float ``[n, h, w]`` drawn by `scale`, where NaN is grey.
    """

    title: str
    images: np.ndarray
    scale: Scale | None = None


class Guess(NamedTuple):
    """A class, the probability that the model gives it, and whether it is the label."""

    name: str
    probability: float
    right: bool


# What is shown --------------------------------------------------------------------------------------------------


class FeatureColours:
    """Colours of features: their first three principal components as red, green and blue.

    The basis, and the ranges that are stretched to full colour (percentiles 2 to 98 of each component), come from
    the features given here, so that others drawn later compare.

    Args:
        features: float ``[N, D]``, N and D at least 3, of one clip.
    """

    def __init__(self, features: np.ndarray):
        self.mean = features.mean(axis=0)
        basis = np.linalg.svd(features - self.mean, full_matrices=False)[2][:3].T  # [D, 3], the largest first
        self.basis = basis * np.sign(basis[np.abs(basis).argmax(axis=0), range(3)])  # the same sign on every machine
        self.low, self.high = np.percentile(self.project(features), (2, 98), axis=0)

    def project(self, features: np.ndarray) -> np.ndarray:
        """``[M, D]`` → coordinates on the three components, ``[M, 3]``."""
        return (features - self.mean) @ self.basis

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """``[M, D]`` → RGB uint8 ``[M, 3]``."""
        share = (self.project(features) - self.low) / np.maximum(self.high - self.low, 1e-12)
        return np.rint(255 * share.clip(0, 1)).astype(np.uint8)


def draw_boxes(frames: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """A copy of frames uint8 ``[T, H, W, 3]`` with the outlines of boxes ``[K, T, 4]`` (x1, y1, x2, y2)."""
    frames = frames.copy()
    width = max(1, round(frames.shape[2] / 112))
    for track, colour in zip(boxes, cycle(BOX_COLOURS)):
        for frame, (x1, y1, x2, y2) in zip(frames, track.tolist()):
            cv2.rectangle(frame, (x1, y1), (x2 - 1, y2 - 1), colour, width)
    return frames


def hide_tokens(frames: np.ndarray, mask: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """A copy of frames uint8 ``[T, H, W, 3]``, dark where the mask bool ``[N]`` hides (True)."""
    hidden = mask.reshape(grid)
    for axis, size in enumerate(frames.shape[:3]):
        hidden = hidden.repeat(size // grid[axis], axis=axis)
    return np.where(hidden[..., None], np.uint8(HIDDEN), frames)


def pretraining_rows(
    natural: np.ndarray,
    clip: np.ndarray,
    boxes: np.ndarray | None,
    mask: np.ndarray,
    targets: np.ndarray,
    grid: tuple[int, int, int],
    predictions: np.ndarray | None = None,
) -> list[Row]:
    """What pretraining does with a clip.

    Args:
        natural, clip: before and after the overlay, uint8 ``[T, H, W, 3]``.
        boxes: of the objects, ``[K, T, 4]``; None without overlay.
        mask: bool ``[N]``, True = hidden.
        targets: the teacher's, ``[N, D]``; predictions: the student's for the hidden tokens, ``[N_masked, D]``.
    """
    colours = FeatureColours(targets)
    rows = [Row("clip", natural)]
    if boxes is not None:
        rows.append(Row("with objects\nand their boxes", draw_boxes(clip, boxes)))
    seen = hide_tokens(clip, mask, grid)
    rows.append(Row(f"mask\n{mask.mean():.0%} hidden", seen if boxes is None else draw_boxes(seen, boxes)))
    rows.append(Row("teacher's features\nPCA, 3 axes as RGB", colours(targets).reshape(*grid, 3)))
    if predictions is None:
        return rows
    guessed = np.full((len(mask), 3), UNKNOWN, np.uint8)
    guessed[mask] = colours(predictions)
    errors = token_errors(predictions, targets, mask)
    rows.append(Row("student's guess\nthe same axes", guessed.reshape(*grid, 3)))
    # Targets have unit variance over the clip, so that always guessing their mean gives an error of about 1.
    scale = Scale(0.0, 2.0, "squared error\n1: guessing the mean")
    return [*rows, Row(f"error, mean {np.nanmean(errors):.2f}\nvisible tokens grey", errors.reshape(grid), scale)]


def token_errors(predictions: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean squared error of every token over its channels, float ``[N]``; NaN where it was visible.

    Args:
        predictions: ``[N_masked, D]``; targets: ``[N, D]``; mask: bool ``[N]``.
    """
    errors = np.full(len(mask), np.nan)
    errors[mask] = np.square(predictions - targets[mask]).mean(axis=1)
    return errors


def attention_rows(frames: np.ndarray, attention: np.ndarray, grid: tuple[int, int, int]) -> list[Row]:
    """Where attention goes.

    Args:
        frames: uint8 ``[T, H, W, 3]``.
        attention: share of each token, ``[N]``, sum 1.
    """
    share = attention.reshape(grid) * attention.size  # 1: what each would get of an even attention
    top = float(np.percentile(share, 99))
    light = (share / top).clip(0.1, 1).repeat(len(frames) // grid[0], axis=0).astype(np.float32)
    size = frames.shape[2:0:-1]
    light = np.stack([cv2.resize(image, size, interpolation=cv2.INTER_LINEAR) for image in light])
    lit = np.rint(frames * light[..., None]).astype(np.uint8)
    scale = Scale(0.0, top, "share of attention\n1: an even share")
    return [
        Row("clip", frames),
        Row("lit by the\nattention received", lit),
        Row("attention received\nlast block, all heads", share, scale),
    ]


# How it is laid out ---------------------------------------------------------------------------------------------


def cell_side(rows: Sequence[Row], about: int) -> int:
    """Side of a cell near `about` pixels, such that every token is a square of whole pixels."""
    tokens = min(row.images.shape[2] for row in rows)
    return tokens * max(1, round(about / tokens))


def cells(row: Row, side: int) -> np.ndarray:
    """A row's images in colour and at their size on the sheet, uint8 ``[n, side, side, 3]``."""
    images = row.images
    if row.scale:
        images = COLOUR_MAP(Normalize(*row.scale[:2])(np.ma.masked_invalid(images)), bytes=True)
    images = np.ascontiguousarray(images[..., :3])
    factor = side / images.shape[2]
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST if factor > 4 else cv2.INTER_CUBIC  # tokens stay sharp
    return np.stack([cv2.resize(image, (side, side), interpolation=how) for image in images])


class Sheet:
    """A white page of `width` x `height` pixels; text, colour bars and bars go to pixel positions from the top left."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width + width % 2, height + height % 2  # even, as video encoders need
        self.figure = Figure(figsize=(self.width / DPI, self.height / DPI), dpi=DPI)
        self.canvas = FigureCanvasAgg(self.figure)

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        """Write, with matplotlib's text properties."""
        self.figure.text(x / self.width, 1 - y / self.height, text, **style)

    def title(self, title: tuple[str, str]) -> None:
        """A bold line, and a small one that is cut at its beginning if it is too long."""
        self.text(MARGIN, 8, title[0], va="top", fontsize=11, fontweight="bold", parse_math=False)
        room = self.width // 7
        small = title[1] if len(title[1]) <= room else "…" + title[1][1 - room :]
        self.text(MARGIN, 27, small, va="top", fontsize=8.5, color="0.35", parse_math=False)

    def axes(self, x: int, y: int, width: int, height: int):
        """Axes that fill a rectangle."""
        return self.figure.add_axes(
            (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        )

    def colour_bar(self, x: int, y: int, side: int, scale: Scale) -> None:
        """The colours of a scale, to the right of a cell that ends at `x`."""
        bar = self.figure.colorbar(
            ScalarMappable(Normalize(*scale[:2]), COLOUR_MAP),
            cax=self.axes(x + GAP, y, 10, side),
            extend="max",
            extendfrac=0.04,
        )
        bar.ax.tick_params(labelsize=7, length=2)
        bar.locator = matplotlib.ticker.MaxNLocator(4)
        bar.set_label(scale.label, fontsize=7.5)

    def guesses(self, x: int, y: int, width: int, guesses: Sequence[Guess]) -> None:
        """Bars of probabilities; the right class is green."""
        axes = self.axes(x, y, width, LINE * len(guesses) * 3 // 2)
        places = range(len(guesses))
        axes.barh(
            places, [g.probability for g in guesses], 0.7, color=["#2a9d4e" if g.right else "#8fa3b8" for g in guesses]
        )
        axes.set(xlim=(0, 1.08), ylim=(len(guesses) - 0.5, -0.5), xticks=[])
        axes.set_yticks(places, [shorten(g.name) for g in guesses], fontsize=9, parse_math=False)
        axes.tick_params(length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        for place, guess in enumerate(guesses):
            axes.text(guess.probability + 0.01, place, f"{guess.probability:.1%}", va="center", fontsize=9)

    def pixels(self) -> np.ndarray:
        """The page, RGB uint8 ``[height, width, 3]``."""
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()


def shorten(name: str, room: int = 24) -> str:
    """A name of at most `room` letters, cut in the middle: long class names often begin alike."""
    return name if len(name) <= room else f"{name[: room // 2 - 1]}…{name[-(room - room // 2) :]}"


def guesses_height(guesses: Sequence[Guess]) -> int:
    """Pixels that the bars take, with the line above them."""
    return len(guesses) * LINE * 3 // 2 + 2 * LINE + MARGIN if guesses else 0


def add_guesses(sheet: Sheet, y: int, left: int, guesses: Sequence[Guess]) -> None:
    """The bars and their heading below the cells, which end at `y`."""
    if guesses:
        sheet.text(left, y + LINE, "most likely classes (green: the label in the list)", va="center", fontsize=9)
        sheet.guesses(left, y + 2 * LINE, sheet.width - left - MARGIN, guesses)


def picture(
    title: tuple[str, str], rows: Sequence[Row], captions: Sequence[str], guesses: Sequence[Guess] = ()
) -> np.ndarray:
    """Rows below each other, a column for each of at most MAX_COLUMNS time steps.

    Args:
        title: a bold line and a small one.
        captions: of the clip's T frames, written above the columns.
    Returns:
        RGB uint8 ``[height, width, 3]``.
    """
    steps = min(len(row.images) for row in rows)
    chosen = np.linspace(0, steps - 1, min(steps, MAX_COLUMNS)).round().astype(int)
    side, left, top = cell_side(rows, 150), 170 + MARGIN, TITLE_ROOM + LINE + GAP
    right = left + len(chosen) * (side + GAP) - GAP
    bottom = top + len(rows) * (side + GAP)
    sheet = Sheet(
        right + (BAR_ROOM if any(row.scale for row in rows) else MARGIN), bottom + guesses_height(guesses) + GAP
    )
    sheet.title(title)
    for column, step in enumerate(chosen):
        caption = captions[step * len(captions) // steps]
        x = left + column * (side + GAP) + side / 2
        sheet.text(x, top - GAP, caption, ha="center", va="bottom", fontsize=8.5, color="0.35")
    for line, row in enumerate(rows):
        y = top + line * (side + GAP)
        sheet.text(left - 10, y + side / 2, row.title, ha="right", va="center", fontsize=9.5, linespacing=1.4)
        if row.scale:
            sheet.colour_bar(right, y, side, row.scale)
    add_guesses(sheet, bottom, left, guesses)
    page = sheet.pixels()
    for line, row in enumerate(rows):
        images = row.images[chosen * len(row.images) // steps]
        for column, cell in enumerate(cells(row._replace(images=images), side)):
            x, y = left + column * (side + GAP), top + line * (side + GAP)
            page[y : y + side, x : x + side] = cell
    return page


def movie(
    title: tuple[str, str], rows: Sequence[Row], captions: Sequence[str], guesses: Sequence[Guess] = ()
) -> Iterator[np.ndarray]:
    """Rows as panels, up to three side by side, which run together.

    Returns:
        T pages, RGB uint8 ``[height, width, 3]``, both sides even.
    """
    side, columns = cell_side(rows, 224), 2 if len(rows) == 4 else min(3, len(rows))
    head, lines = 2 * LINE + 3 * GAP, -(-len(rows) // columns)
    bottom = TITLE_ROOM + lines * (head + side)
    right = MARGIN + columns * (side + 2 * GAP) - 2 * GAP
    sheet = Sheet(
        right + (BAR_ROOM if any(row.scale for row in rows) else MARGIN), bottom + guesses_height(guesses) + MARGIN
    )
    places = [
        (MARGIN + i % columns * (side + 2 * GAP), TITLE_ROOM + i // columns * (head + side) + head)
        for i in range(len(rows))
    ]
    sheet.title(title)
    for row, (x, y) in zip(rows, places):
        sheet.text(x, y - GAP, row.title, va="bottom", fontsize=9.5, linespacing=1.3)
        if row.scale:
            sheet.colour_bar(x + side, y, side, row.scale)
    add_guesses(sheet, bottom, 170 + MARGIN, guesses)
    page, panels, total = sheet.pixels(), [cells(row, side) for row in rows], len(captions)
    for frame in range(total):
        for panel, (x, y) in zip(panels, places):
            page[y : y + side, x : x + side] = panel[frame * len(panel) // total]
        yield page.copy()


# Files ----------------------------------------------------------------------------------------------------------


def write_movie(path: Path, pages: Sequence[np.ndarray], fps: float) -> None:
    """Write pages RGB uint8 ``[height, width, 3]`` as .gif, which starts again at its end, or as .mp4 (H.264)."""
    if path.suffix == ".gif":
        first, *others = map(Image.fromarray, pages)
        first.save(path, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
        return
    rate = Fraction(fps).limit_denominator(1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=rate)
        stream.height, stream.width = pages[0].shape[:2]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18", "qscale": "3"}
        for number, page in enumerate(pages):
            frame = av.VideoFrame.from_ndarray(page, "rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
