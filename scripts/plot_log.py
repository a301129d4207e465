"""Draw training curves and test results.

    python scripts/plot_log.py output/stage1 output/stage2            # both in one picture
    python scripts/plot_log.py output/finetuned --output_dir pictures  # curves, confusion matrix, accuracy by class

Takes run folders or files: `log.txt` (one JSON line per epoch), and the `test_predictions.npz` and
`test_per_class.csv` of tests. Writes curves.png, and for each test confusion-<run>.png and per_class-<run>.png.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from run_logs import read_log

from utils import RunError, run_main, user_errors
from visualization import shorten

LOG, PREDICTIONS, PER_CLASS = "log.txt", "test_predictions.npz", "test_per_class.csv"
# Panels in this order: title → (key of log.txt, line style, name in the legend or "" if there is only one line)
PANELS = {
    "loss": (("train_loss", "-", ""),),
    "loss of hidden tokens": (("train_loss_objects", "-", "under objects"), ("train_loss_background", "--", "others")),
    "top-1 accuracy, %": (("val_acc1", "-", "validation"), ("test_acc1", "o", "test")),
    "top-5 accuracy, %": (("val_acc5", "-", "validation"), ("test_acc5", "o", "test")),
    "mean average precision, %": (("val_map", "-", "validation"), ("test_map", "o", "test")),
    "spread of features over tokens (0: collapse)": (
        ("train_pred_std", "-", "student"),
        ("train_target_std", "--", "teacher"),
    ),
    "learning rate": (("lr", "-", ""),),
    "norm of the gradient": (("train_grad_norm", "-", ""),),
    "seconds an epoch": (("seconds", "-", ""),),
    "bad clips and skipped steps": (("bad_clips", "-", "bad clips"), ("skipped_steps", "--", "skipped steps")),
}
RARE = ("bad_clips", "skipped_steps")  # not drawn if always 0
MOST_ERRORS = 15
MAX_NAMED = 25  # classes with names in a confusion matrix
SHOWN_CLASSES = 40  # bars in one picture


class ClassResult(NamedTuple):
    """A line of test_per_class.csv: accuracies in percent, or average precision for multi-label tests."""

    name: str
    videos: int
    top1: float
    top5: float | None


def curve(log: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Completed epochs (numbered from 0 in the log) and values of a key; the line of a test has no epoch of its own."""
    epochs, values, epoch = [], [], 0
    for line in log:
        epoch = line.get("epoch", epoch - 1) + 1
        if isinstance(line.get(key), (int, float)):
            epochs.append(epoch)
            values.append(line[key])
    return np.array(epochs), np.array(values, dtype=float)


def confusion_matrix(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Number of videos by label (row) and predicted class (column), int ``[C, C]``; ties go to the lowest class.

    Videos that could not be read, whose `scores` are NaN, are left out.
    """
    read = ~np.isnan(scores).any(axis=1)
    matrix = np.zeros((scores.shape[1],) * 2, dtype=int)
    np.add.at(matrix, (labels[read], scores[read].argmax(axis=1)), 1)
    return matrix


def read_predictions(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels ``[n]`` (multi-label: ``[n, C]``) and scores ``[n, C]`` of a test_predictions.npz."""
    try:
        with np.load(path) as file:
            return file["label"], file["scores"]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{path}: not the predictions of a test ({error})") from error


def read_classes(path: Path) -> dict[int, ClassResult]:
    """Read a test_per_class.csv: class number → result; a class without a name is called by its number."""
    results = {}
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                scores = (float(row["ap"]), None) if "ap" in row else (float(row["top1"]), float(row["top5"]))
                name = row["name"] or f"class {row['class']}"
                results[int(row["class"])] = ClassResult(name, int(row["videos"]), *scores)
            return results
    except (KeyError, ValueError, TypeError) as error:
        raise RunError(f"{path}: not a table of classes ({error})") from error


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """A figure of this size in inches, with a heading."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure


def draw_curves(logs: dict[str, list[dict]]) -> Figure:
    """Draw one panel for each quantity in the logs, with one colour for each run. Raises RunError if there is none."""
    keys = {key for log in logs.values() for line in log for key in line if line[key] or key not in RARE}
    known = {title: [line for line in lines if line[0] in keys] for title, lines in PANELS.items()}
    panels = {title: lines for title, lines in known.items() if lines}
    if not panels:
        raise RunError(f"{', '.join(logs)}: none of the numbers of a run in it")
    rows, columns = -(-len(panels) // 3), min(3, len(panels))
    figure = new_figure(4.6 * columns, 3.1 * rows + 0.3 * len(logs), "" if len(logs) > 1 else next(iter(logs)))
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, lines) in zip(grid, panels.items()):
        draw_panel(axes, logs, lines)
        axes.set_title(title, fontsize=10)
        if "accuracy" in title:
            axes.set_ylim(top=min(axes.get_ylim()[1], 101))
        elif title != "loss":
            axes.set_ylim(bottom=0)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[len(panels) - columns : len(panels)]:
        axes.set_xlabel("epochs done")
    if len(logs) > 1:
        handles = [Line2D([], [], color=f"C{number}") for number in range(len(logs))]
        figure.legend(handles, list(logs), loc="outside upper left", ncols=min(4, len(logs)), frameon=False)
    return figure


def draw_panel(axes: Axes, logs: dict[str, list[dict]], wanted: list[tuple[str, str, str]]) -> None:
    """Draw the curves of some keys; a single value is drawn as a dot."""
    for number, log in enumerate(logs.values()):
        for key, style, _ in wanted:
            epochs, values = curve(log, key)
            axes.plot(epochs, values, "o" if len(values) == 1 else style, color=f"C{number}", markersize=5)
    if len(wanted) > 1:
        handles = [axes.plot([], [], style, color="0.3", markersize=5)[0] for _, style, _ in wanted]
        axes.legend(handles, [name for _, _, name in wanted], fontsize=8, frameon=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_confusion(matrix: np.ndarray, names: list[str], title: str, unread: int = 0) -> Figure:
    """Draw a confusion_matrix as shares of each label, and the most frequent errors; it lacks `unread` videos."""
    total = matrix.sum(axis=1, keepdims=True)
    share = np.where(total > 0, 100 * matrix / np.maximum(total, 1), np.nan)
    few, right, videos = len(matrix) <= MAX_NAMED, int(np.trace(matrix)), int(matrix.sum())
    lost = f", {unread} unreadable left out" if unread else ""
    heading = f"{title}: {right} of {videos} videos right ({100 * right / max(1, videos):.1f} %){lost}"
    figure = new_figure(13, 7.2, heading)
    axes, side = figure.subplots(1, 2, width_ratios=(1.35, 1))
    norm = PowerNorm(0.5, 0, 100)  # makes small shares visible
    image = axes.imshow(share, cmap="Blues", norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, cax=axes.inset_axes((1.03, 0, 0.04, 1)), label="% of the label's videos")
    bar.set_ticks((0, 1, 5, 10, 25, 50, 75, 100))
    axes.set(xlabel="predicted class", ylabel="label")
    if few:
        axes.set_xticks(range(len(names)), [shorten(name) for name in names], rotation=45, ha="right")
        axes.set_yticks(range(len(names)), [shorten(name) for name in names])
        for row, column in np.argwhere(matrix):
            colour = "white" if share[row, column] > 40 else "black"
            axes.text(column, row, matrix[row, column], ha="center", va="center", color=colour, fontsize=8)
    axes.set_title("number of videos" if few else f"{len(matrix)} classes by number", fontsize=10)
    draw_mix_ups(side, matrix, names)
    return figure


def draw_mix_ups(axes: Axes, matrix: np.ndarray, names: list[str]) -> None:
    """Draw bars for the most frequent errors, at most MOST_ERRORS."""
    pairs = [(label, guess) for label, guess in np.argwhere(matrix).tolist() if label != guess]
    pairs = sorted(pairs, key=lambda pair: -matrix[pair])[:MOST_ERRORS]
    axes.barh(range(len(pairs)), [matrix[pair] for pair in pairs], color="#d9822b")
    labels = [f"{shorten(names[label])} → {shorten(names[guess])}" for label, guess in pairs]
    axes.set_yticks(range(len(pairs)), labels, fontsize=8)
    axes.set_ylim(MOST_ERRORS - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("videos")
    axes.set_title("most frequent errors, label → predicted" if pairs else "no errors", fontsize=10, loc="right")


def draw_classes(classes: dict[int, ClassResult], title: str) -> Figure:
    """Top-1 (bar) and top-5 (mark) accuracy by class, or average precision; of many classes the best and worst."""
    one_label = all(result.top5 is not None for result in classes.values())
    metric, name = ("accuracy", "top-1") if one_label else ("average precision", "average precision")
    ranked = sorted(classes.values(), key=lambda result: -result.top1)
    half, middle = SHOWN_CLASSES // 2, -(-len(ranked) // 2)
    parts = {f"the best {half} of {len(ranked)} classes": ranked[:half], f"the worst {half}": ranked[-half:]}
    if len(ranked) <= half:
        parts = {f"all {len(ranked)} classes": ranked}
    elif len(ranked) <= SHOWN_CLASSES:
        parts = {"the better half": ranked[:middle], "the other half": ranked[middle:]}
    longest, mean = max(map(len, parts.values())), np.mean([result.top1 for result in ranked])
    heading = f"{title}: {metric} by class (number of videos)"
    figure = new_figure(6.5 * len(parts), 0.24 * longest + 1.6, heading)
    for axes, (which, part) in zip(figure.subplots(1, len(parts), squeeze=False).flat, parts.items()):
        places = range(len(part))
        bars = axes.barh(places, [result.top1 for result in part], color="#4c86c6")
        marks = axes.plot([result.top5 for result in part], places, "|", color="0.25", markersize=9, mew=2)[:one_label]
        line = axes.axvline(mean, color="0.5", linestyle=":")
        axes.set_yticks(places, [f"{shorten(result.name, 32)} ({result.videos})" for result in part], fontsize=8)
        axes.set(xlim=(0, 101), ylim=(longest - 0.5, -0.5), xlabel=f"{metric}, %")
        axes.set_title(which, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    labels = (name, *["top-5"] * one_label, f"mean {name}, {mean:.1f} %")
    figure.legend((bars, *marks, line), labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def files_in(path: Path) -> list[Path]:
    """Files of a run that can be drawn, or the file itself. Raises RunError for a folder without such files."""
    found = [path / name for name in (LOG, PREDICTIONS, PER_CLASS) if (path / name).is_file()]
    if not found and not path.is_file():
        raise RunError(f"{path}: no {LOG}, {PREDICTIONS} or {PER_CLASS} there")
    return found or [path]


def run_names(files: list[Path]) -> dict[Path, str]:
    """Return the shortest unique name for the folder of each file."""
    folders = {file: file.absolute().parent.parts for file in files}
    for depth in range(1, max(map(len, folders.values())) + 1):
        names = {file: "-".join(parts[-depth:]).replace("/", "") for file, parts in folders.items()}
        if len(set(names.values())) == len(set(folders.values())):
            break
    return names


def confusion_picture(file: Path, title: str) -> Figure | None:
    """Draw the predictions of a test; None for videos with several labels. Names come from the table of classes."""
    labels, scores = read_predictions(file)
    if labels.ndim == 2:
        print(f"{file}: no confusion matrix, since videos have several labels")
        return None
    table = read_classes(file.with_name(PER_CLASS)) if file.with_name(PER_CLASS).is_file() else {}
    classes = [table[c].name if c in table else f"class {c}" for c in range(scores.shape[1])]
    matrix = confusion_matrix(labels, scores)
    return draw_confusion(matrix, classes, title, len(labels) - int(matrix.sum()))


def main(argv: list[str] | None = None) -> None:
    """Draw all files, logs together in one picture, and print the paths of the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="run folders or files")
    parser.add_argument("--output_dir", type=Path, default="pictures", help="folder for the pictures (%(default)s)")
    args = parser.parse_args(argv)
    names, logs = run_names([file for path in args.paths for file in files_in(path)]), {}
    figures: dict[str, Figure | None] = {}
    for file, name in names.items():
        if file.suffix == ".npz":
            figures[f"confusion-{name}.png"] = confusion_picture(file, name)
        elif file.suffix == ".csv":
            figures[f"per_class-{name}.png"] = draw_classes(read_classes(file), name)
        elif file.suffix in (".txt", ".jsonl"):
            logs[name] = read_log(file)
        else:
            raise RunError(f"{file}: neither a {LOG}, nor a {PREDICTIONS}, nor a {PER_CLASS}")
    if logs:
        figures["curves.png"] = draw_curves(logs)
    with user_errors():
        args.output_dir.mkdir(parents=True, exist_ok=True)
        for file_name, figure in figures.items():
            if figure:
                figure.savefig(args.output_dir / file_name)
                print(args.output_dir / file_name)


if __name__ == "__main__":
    run_main(main)
