"""The table of the SEVERE benchmark: our results next to those of the paper.

    python scripts/severe/severe_table.py fx_s1=output/fx_s1 ucf_rc=output/ucf_rc [--csv FILE --picture FILE]

Reads the last test in the ``log.txt`` of each folder and prints one row per cell. A cell without a test gets a dash.
The mean of our results is shown only if all eight cells have one.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from run_logs import last_test

from utils import run_main


class Cell(NamedTuple):
    """A cell of the benchmark: its name, its metric in words and as a key of log.txt, and the digits shown."""

    name: str
    metric: str
    key: str
    digits: int = 1


CELLS = {
    "ssv2": Cell("SSv2", "top-1", "test_acc1"),
    "gym99": Cell("Gym-99", "top-1", "test_acc1"),
    "ucf101_1k": Cell("UCF101, 1,010 videos", "top-1", "test_acc1"),
    "gym99_1k": Cell("Gym-99, 1,089 videos", "top-1", "test_acc1"),
    "fx_s1": Cell("FX-S1", "top-1", "test_acc1"),
    "ub_s1": Cell("UB-S1", "top-1", "test_acc1"),
    "ucf_rc": Cell("UCF-RC", "counting error (lower is better)", "test_mae", 3),
    "charades": Cell("Charades", "mAP", "test_map"),
}
CLASS_MEAN = ("gym99", "gym99_1k", "fx_s1", "ub_s1")  # the paper does not say if top-1 or class means
# ViT-B pretrained on Kinetics-400, from the SMILE paper's table of SEVERE, whose means follow from `mean` below.
PAPER = {
    "VideoMAE": (68.6, 86.6, 74.6, 25.9, 42.8, 65.3, 0.172, 14.4),
    "MVD": (70.0, 82.5, 67.1, 17.5, 31.3, 50.5, 0.184, 16.1),
    "MGMAE": (68.9, 87.2, 77.2, 24.1, 33.7, 79.5, 0.181, 17.9),
    "MGM": (71.1, 89.1, 78.4, 26.4, 38.6, 86.9, 0.152, 22.5),
    "SIGMA": (70.9, 89.7, 84.1, 28.0, 55.1, 79.9, 0.169, 23.1),
    "MME": (70.1, 89.7, 79.2, 29.8, 55.5, 87.2, 0.155, 23.6),
    "SMILE w/o motion": (71.6, 90.0, 85.2, 32.0, 53.4, 74.3, 0.175, 30.5),
    "SMILE": (72.1, 90.8, 86.4, 35.1, 55.1, 88.3, 0.170, 32.5),
}
DRAWN = ("VideoMAE", "SIGMA", "SMILE w/o motion", "SMILE")
NOTE = "*: the SMILE paper's figures (ViT-B, Kinetics-400), not measured with this code."


def percent(cell: str, value: float) -> float:
    """Convert a result for the mean: in percent, higher is better."""
    return 100 * (1 - value) if cell == "ucf_rc" else value


def mean(values: dict[str, float]) -> float | None:
    """Mean over the eight cells as in the paper: percentages and 100 · (1 - counting error); None if one is missing."""
    return float(np.mean([percent(cell, values[cell]) for cell in CELLS])) if values.keys() >= CELLS.keys() else None


def show(cell: str, value: float | None) -> str:
    """Format the result of a cell, or of the mean; a dash if there is none."""
    return "–" if value is None else f"{value:.{CELLS[cell].digits if cell in CELLS else 1}f}"


def results(tests: dict[str, dict[str, float]]) -> dict[str, float]:
    """Results of the cells that have one."""
    return {cell: tests[cell][about.key] for cell, about in CELLS.items() if about.key in tests.get(cell, {})}


def rows(tests: dict[str, dict[str, float]]) -> list[list[str]]:
    """Headings and rows: cell, metric, our result, the paper's results; with the mean if all cells were requested."""
    columns = [results(tests), *(dict(zip(CELLS, figures)) for figures in PAPER.values())]
    table = [["cell", "metric", "ours", *(f"{name}*" for name in PAPER)]]
    for cell in [cell for cell in CELLS if cell in tests]:
        table.append([CELLS[cell].name, CELLS[cell].metric, *(show(cell, column.get(cell)) for column in columns)])
        if cell in CLASS_MEAN:
            table.append(["", "class-mean top-1", show(cell, tests[cell].get("test_class_acc1")), *[""] * len(PAPER)])
    if tests.keys() >= CELLS.keys():
        table.append(["mean", "", *(show("mean", mean(column)) for column in columns)])
    return table


def markdown(table: list[list[str]]) -> str:
    """The table in Markdown, with a note."""
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", NOTE])


def write_csv(table: list[list[str]], path: Path) -> None:
    """Write the table; a dash becomes an empty field."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([text.replace("*", " (the paper's)") for text in table[0]])
        writer.writerows([["" if text == "–" else text for text in line] for line in table[1:]])


def radar(ours: dict[str, float]):
    """Radar chart of our results by cell and of DRAWN: one axis per cell, from the worst to the best drawn value."""
    from matplotlib.figure import Figure  # imported here because it is slow and tables do not need it

    lines = {name: dict(zip(CELLS, PAPER[name])) for name in DRAWN} | ({"ours": ours} if ours else {})
    ranked = {}
    for cell in CELLS:
        found = [line[cell] for line in lines.values() if cell in line]
        ranked[cell] = sorted(found, reverse=cell == "ucf_rc")
    angles = dict(zip(CELLS, np.arange(len(CELLS)) * 2 * np.pi / len(CELLS)))
    figure = Figure(figsize=(9, 7), layout="constrained", dpi=110)
    axes = figure.add_subplot(projection="polar")
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    for name, line in lines.items():
        closed = [*line, *list(line)[: len(line) == len(CELLS)]]  # ours may lack cells
        shares = [(line[cell] - ranked[cell][0]) / (ranked[cell][-1] - ranked[cell][0]) for cell in closed]
        style = {"color": "black", "linewidth": 2.2, "marker": "o"} if name == "ours" else {}
        label = name if name == "ours" else f"{name} (the paper's)"
        axes.plot([angles[cell] for cell in closed], [0.25 + 0.75 * share for share in shares], label=label, **style)
    heads = [
        f"{CELLS[cell].name}\n{show(cell, worst)} – {show(cell, best)}" for cell, (worst, *_, best) in ranked.items()
    ]
    axes.set(ylim=(0, 1.02), yticks=[0.25, 0.5, 0.75, 1], yticklabels=[])
    axes.set_xticks(list(angles.values()), heads)
    for label, angle in zip(axes.get_xticklabels(), angles.values()):  # write away from the circle
        side = round(np.sin(angle), 6)
        label.set_horizontalalignment("center" if side == 0 else "left" if side > 0 else "right")
    axes.tick_params(axis="x", pad=6)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("SEVERE: each axis from the worst to the best that is drawn", x=0.01, ha="left", fontsize=11)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, and write the requested files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="CELL=FOLDER", help=f"cells: {', '.join(CELLS)}")
    parser.add_argument("--csv", type=Path, help="file to write the table to, too")
    parser.add_argument("--picture", type=Path, help="radar picture to draw")
    args, tests = parser.parse_args(argv), {}
    for run in args.runs:
        cell, equals, folder = run.partition("=")
        if cell not in CELLS or not equals:
            parser.error(f"{run}: not CELL=FOLDER with one of the cells {', '.join(CELLS)}")
        tests[cell] = last_test(Path(folder))
    table = rows(tests)
    print(markdown(table))
    if args.csv:
        write_csv(table, args.csv)
    if args.picture:
        radar(results(tests)).savefig(args.picture)


if __name__ == "__main__":
    run_main(main)
