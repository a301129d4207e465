"""Pictures and movies of a clip and of the values of its tokens; run_visualization.py computes the arrays.

A `Row` is one quantity over the time of a clip. `picture` draws rows below each other, one column for each time step;
`movie` draws them side by side and plays them. Shapes: T frames of H x W pixels, a token grid (t, h, w) with N = t·h·w
tokens, K objects, D features.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage

BOX_COLOURS = ((255, 255, 0), (0, 255, 255), (255, 0, 255), (0, 255, 0))
HIDDEN, UNKNOWN = 40, 217  # grey of hidden pixels, and of tokens without a value
COLOUR_MAP = matplotlib.colormaps["inferno"].with_extremes(bad=(UNKNOWN / 255,) * 3)
MAX_COLUMNS = 8


class Row(NamedTuple):
    """One quantity over time."""

    title: str
    images: np.ndarray  # uint8 [n, h, w, 3], or float [n, h, w] drawn in the colours of a bar, where NaN is grey
    top: float = 0.0  # value at the top of the bar, which begins at 0; 0: no bar
    label: str = ""  # of the bar


class Guess(NamedTuple):
    """A class, its predicted probability, and whether it is the label."""

    name: str
    probability: float
    right: bool


# Rows ------------------------------------------------------------------------------------------------------------


class FeatureColours:
    """Maps features to colours: the first three principal components of `features` as red, green and blue.

    Components and their ranges (percentiles 2 to 98, stretched to full colour) stay fixed, so that features drawn later
    have comparable colours.

    Args:
        features: float ``[N, D]``, N and D at least 3, of one clip.
    """

    def __init__(self, features: np.ndarray):
        self.mean = features.mean(axis=0)
        basis = np.linalg.svd(features - self.mean, full_matrices=False)[2][:3].T  # [D, 3], the largest first
        self.basis = basis * np.sign(basis[np.abs(basis).argmax(axis=0), range(3)])  # the sign of an SVD is arbitrary
        self.low, self.high = np.percentile(self.project(features), (2, 98), axis=0)

    def project(self, features: np.ndarray) -> np.ndarray:
        """Project ``[M, D]`` onto the three components, ``[M, 3]``."""
        return (features - self.mean) @ self.basis

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """``[M, D]`` → RGB uint8 ``[M, 3]``."""
        share = (self.project(features) - self.low) / np.maximum(self.high - self.low, 1e-12)
        return np.rint(255 * share.clip(0, 1)).astype(np.uint8)


def draw_boxes(frames: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Draw the outlines of boxes ``[K, T, 4]`` (x1, y1, x2, y2) on a copy of frames uint8 ``[T, H, W, 3]``."""
    frames = frames.copy()
    width = max(1, round(frames.shape[2] / 112))
    for track, colour in zip(boxes, cycle(BOX_COLOURS)):
        for frame, (x1, y1, x2, y2) in zip(frames, track.tolist()):
            cv2.rectangle(frame, (x1, y1), (x2 - 1, y2 - 1), colour, width)
    return frames


def hide_tokens(frames: np.ndarray, mask: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """Darken frames uint8 ``[T, H, W, 3]`` where the mask bool ``[N]`` is True; returns a copy."""
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
    """Make the rows of a pretraining sample: clip, objects, mask, targets, the student's predictions and their error.

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
    errors = np.full(len(mask), np.nan)
    errors[mask] = np.square(predictions - targets[mask]).mean(axis=1)
    rows.append(Row("student's guess\nthe same axes", guessed.reshape(*grid, 3)))
    # Targets have unit variance over the clip, so that always predicting their mean gives an error of about 1.
    title, label = f"error, mean {np.nanmean(errors):.2f}\nvisible tokens grey", "squared error\n1: predicting the mean"
    return [*rows, Row(title, errors.reshape(grid), 2.0, label)]


def attention_rows(frames: np.ndarray, attention: np.ndarray, grid: tuple[int, int, int]) -> list[Row]:
    """Make rows of frames uint8 ``[T, H, W, 3]``, and of the attention on each token, ``[N]``, sum 1."""
    share = attention.reshape(grid) * attention.size  # 1: the share of uniform attention
    top = float(np.percentile(share, 99))
    light = (share / top).clip(0.1, 1).repeat(len(frames) // grid[0], axis=0).astype(np.float32)
    light = np.stack([cv2.resize(image, frames.shape[2:0:-1]) for image in light])  # bilinear
    lit = np.rint(frames * light[..., None]).astype(np.uint8)
    rows = [Row("clip", frames), Row("lit by the\nattention received", lit)]
    label = "share of attention\n1: uniform attention"
    return [*rows, Row("attention received\nlast block, all heads", share, top, label)]


# Figures --------------------------------------------------------------------------------------------------------


def shorten(name: str, room: int = 24) -> str:
    """Cut a name to at most `room` letters, in the middle, as long class names often begin alike."""
    return name if len(name) <= room else f"{name[: room // 2 - 1]}…{name[-(room - room // 2) :]}"


def draw_guesses(axes: Axes, guesses: Sequence[Guess]) -> None:
    """Draw probabilities as bars; the class in the list is green."""
    names, probabilities, right = zip(*guesses)
    bars = axes.barh(range(len(names)), probabilities, color=["#2a9d4e" if yes else "#8fa3b8" for yes in right])
    axes.bar_label(bars, fmt="{:.1%}", padding=3)
    axes.set(xlim=(0, 1.1), xticks=[])
    axes.set_title("most likely classes (green: the label in the list)", loc="left")
    axes.set_yticks(range(len(names)), map(shorten, names), parse_math=False)
    axes.invert_yaxis()
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def new_figure(
    title: tuple[str, str], grid: tuple[int, int], cell: tuple[float, float], guesses: Sequence[Guess]
) -> tuple[Figure, Figure | SubFigure, np.ndarray]:
    """Make a figure with a grid (lines, columns) of cells (width, height in inches), and bars of guesses below.

    Returns:
        the figure, the part of it that holds the cells, and their axes ``[lines, columns]``.
    """
    height, below = grid[0] * cell[1], 0.3 * len(guesses) + 0.5
    figure = Figure((max(8, grid[1] * cell[0] + 2.5), height + bool(guesses) * below + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title[0], fontweight="bold", parse_math=False)
    figure.supxlabel(shorten(title[1], int(12 * figure.get_figwidth())), fontsize="small", parse_math=False)
    cells: Figure | SubFigure = figure
    if guesses:
        parts = figure.subfigures(2, 1, height_ratios=(height, below), squeeze=False).ravel()
        cells = parts[0]
        draw_guesses(parts[1].subplots(), guesses)
    return figure, cells, cells.subplots(*grid, squeeze=False)


def show(axes: Axes, row: Row, index: int) -> AxesImage:
    """Draw image number `index` of a row."""
    axes.set(xticks=[], yticks=[], anchor="W")
    axes.spines[:].set_visible(False)
    return axes.imshow(row.images[index], COLOUR_MAP, vmin=0.0, vmax=row.top)  # a range for numbers, not for colours


def picture(
    title: tuple[str, str], rows: Sequence[Row], captions: Sequence[str], guesses: Sequence[Guess] = ()
) -> Figure:
    """Draw rows below each other, with a column for each of at most MAX_COLUMNS time steps.

    Args:
        title: a bold line and a small one.
        captions: of the clip's T frames, written above the columns.
    """
    steps = min(len(row.images) for row in rows)
    chosen = np.linspace(0, steps - 1, min(steps, MAX_COLUMNS)).round().astype(int)
    figure, part, cells = new_figure(title, (len(rows), len(chosen)), (1.5, 1.6), guesses)
    for axes, step in zip(cells[0], chosen):
        axes.set_title(captions[step * len(captions) // steps], fontsize="small")
    for line, row in zip(cells, rows):
        line[0].set_ylabel(row.title, rotation=0, ha="right", va="center")
        images = [show(axes, row, step * len(row.images) // steps) for axes, step in zip(line, chosen)]
        if row.top:
            part.colorbar(images[0], ax=list(line), label=row.label, extend="max", panchor=False)
    return figure


def pixels(figure: Figure) -> np.ndarray:
    """Render a figure, RGB uint8 ``[height, width, 3]``, both sides even, as video encoders need."""
    figure.canvas.draw()
    page = np.asarray(figure.canvas.buffer_rgba())  # type: ignore[attr-defined]
    return page[: len(page) // 2 * 2, : page.shape[1] // 2 * 2, :3].copy()


def movie(
    title: tuple[str, str], rows: Sequence[Row], captions: Sequence[str], guesses: Sequence[Guess] = ()
) -> Iterator[np.ndarray]:
    """Draw rows as panels that play together, up to three side by side; yields T pages, see pixels."""
    columns, total = 2 if len(rows) == 4 else min(3, len(rows)), len(captions)
    figure, part, cells = new_figure(title, (-(-len(rows) // columns), columns), (2.4, 2.9), guesses)
    panels = [show(axes, row, 0) for axes, row in zip(cells.flat, rows)]
    for panel, row in zip(panels, rows):
        panel.axes.set_title(row.title, loc="left", fontsize="medium")
        if row.top:
            part.colorbar(panel, label=row.label, extend="max", panchor=False)
    for axes in cells.flat[len(rows) :]:
        axes.remove()
    figure.canvas.draw()
    figure.set_layout_engine("none")  # laid out once, so that nothing moves from page to page
    for frame in range(total):
        for panel, row in zip(panels, rows):
            panel.set_data(row.images[frame * len(row.images) // total])
        yield pixels(figure)


# Files ----------------------------------------------------------------------------------------------------------


def write_movie(path: Path, pages: Sequence[np.ndarray], fps: float) -> None:
    """Write pages RGB uint8 ``[height, width, 3]`` as a video (H.264, or MPEG-4 where PyAV has no libx264)."""
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
