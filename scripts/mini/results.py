"""Tables and pictures of the mini world, from the logs of its runs.

    python scripts/mini/results.py quickstart DIR
    python scripts/mini/results.py benchmark DIR [--document MINI_BENCHMARK.md] [--picture assets/mini_benchmark.png]

`quickstart` prints the four scores of scripts/quickstart.sh. `benchmark` reads ``DIR/seed-S/ROW/COLUMN/log.txt`` of
run_benchmark.sh, writes ``DIR/results.csv``, and inserts the table between the two marker lines of the document.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from run_logs import last_test, read_log

ROWS = {  # folder → description; other rows come after these and are called by their folder
    "scratch": "from scratch",
    "black": "stage 1 on black frames",
    "pixel-tube": "pixels, tube mask (VideoMAE)",
    "pixel-overlay-tube": "pixels, overlay, tube mask",
    "pixel-two-stages": "pixels, both stages",
    "teacher-tube": "teacher, tube mask",
    "teacher-overlay-tube": "teacher, overlay, tube mask",
    "stage1": "teacher, overlay, trajectory mask (stage 1)",
    "two-stages-tube": "both stages, without the trajectory mask",
    "two-stages": "stage 1, then stage 2 (SMILE)",
    "teacher": "the teacher itself, frame by frame",
}
COLUMNS = {  # folder → heading
    "motion": "motion, fine-tuned",
    "motion-few": "motion, 50 labels a class",
    "motion-probe": "motion, probe",
    "object-few": "object, 10 labels a class",
    "object-probe": "object, probe",
    "count": "count, fine-tuned",
    "composition": "composition, fine-tuned",
}
CHANCE = {"motion": 12.5, "object": 5.0, "count": 25.0, "composition": 25.0}
Scores = dict[str, dict[str, dict[int, float]]]  # row → column → seed → test accuracy in percent
BEGIN, END = "<!-- table: written by scripts/mini/results.py -->", "<!-- end of table -->"


def test_score(folder: Path) -> tuple[float, int] | None:
    """Test accuracy in percent and number of test clips; None if the run has not finished."""
    test = last_test(folder)
    return (test["test_acc1"], int(test["test_videos"])) if test else None


def standard_error(percent: float, clips: int) -> float:
    """Binomial standard error of an accuracy in percent over a number of clips."""
    return (percent * (100 - percent) / clips) ** 0.5


def quickstart_table(folder: Path) -> str:
    """The scores of the quickstart as a Markdown table.

    Raises:
        SystemExit: a run has no test score.
    """
    lines = ["| | test accuracy, % | standard error | test clips | chance |", "|---|---|---|---|---|"]
    for name, label, chance in (
        ("finetuned", "motion: fine-tuned from stage 2", CHANCE["motion"]),
        ("scratch", "motion: the same from scratch", CHANCE["motion"]),
        ("count", "count: fine-tuned from stage 2", CHANCE["count"]),
        ("count-scratch", "count: the same from scratch", CHANCE["count"]),
    ):
        score = test_score(folder / name)
        if score is None:
            sys.exit(f"error: {folder / name / 'log.txt'} holds no test score: start scripts/quickstart.sh again")
        lines.append(f"| {label} | **{score[0]:.1f}** | {standard_error(*score):.1f} | {score[1]} | {chance:g} |")
    losses = [read_log(folder / stage / "log.txt")[-1]["train_loss"] for stage in ("stage1", "stage2")]
    lines += ["", f"Loss {losses[0]:.2f} after stage 1, {losses[1]:.2f} after stage 2; 1: predicting the mean."]
    return "\n".join(lines)


def collect(folder: Path) -> Scores:
    """Read the scores of all rows, which come in the order of ROWS."""
    seeds = sorted(int(path.name.removeprefix("seed-")) for path in folder.glob("seed-*"))
    found = sorted({path.name for path in folder.glob("seed-*/*") if path.is_dir()})
    scores: Scores = {}
    for row in sorted(found, key=lambda name: list(ROWS).index(name) if name in ROWS else len(ROWS)):
        for column in COLUMNS:
            values = {seed: test_score(folder / f"seed-{seed}" / row / column) for seed in seeds}
            scores.setdefault(row, {})[column] = {seed: value[0] for seed, value in values.items() if value}
    return {row: columns for row, columns in scores.items() if any(columns.values())}


def spread(seeds: dict[int, float]) -> str:
    """Mean ± standard deviation over seeds; for one seed only the value."""
    values = list(seeds.values())
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def measured(scores: Scores) -> dict[str, str]:
    """Those of COLUMNS that a row has."""
    return {name: heading for name, heading in COLUMNS.items() if any(columns[name] for columns in scores.values())}


def benchmark_table(scores: Scores) -> str:
    """The scores as a Markdown table."""
    shown = measured(scores)
    lines = ["| test accuracy, % | " + " | ".join(shown.values()) + " |", "|---" * (1 + len(shown)) + "|"]
    chance = [f"{CHANCE[column.partition('-')[0]]:g}" for column in shown]
    lines.append("| chance | " + " | ".join(chance) + " |")
    for row, columns in scores.items():
        cells = [spread(columns[column]) for column in shown]
        lines.append(f"| {ROWS.get(row, row)} | " + " | ".join(cells) + " |")
    seeds = max(len(values) for columns in scores.values() for values in columns.values())
    lines += ["", f"Seeds: {seeds}." + (" Mean ± standard deviation over seeds." if seeds > 1 else "")]
    return "\n".join(lines)


def write_csv(scores: Scores, path: Path) -> None:
    """Write one line for each row, column and seed."""
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["row", "column", "seed", "test_acc1"])
        for row, columns in scores.items():
            for column, values in columns.items():
                table.writerows([row, column, seed, f"{value:.3f}"] for seed, value in values.items())


def paint(scores: Scores, path: Path) -> None:
    """Draw a bar chart for every column, one colour per row, with the standard deviation over seeds."""
    import matplotlib  # imported here because it is slow and tables do not need it

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = measured(scores)
    figure, axes = plt.subplots(1, len(shown), figsize=(12, 3.6), sharey=True, layout="constrained", squeeze=False)
    colours = matplotlib.colormaps["viridis"](np.linspace(0.95, 0.1, len(scores)))
    places = np.arange(len(scores))[::-1]
    for axis, (column, heading) in zip(axes[0], shown.items()):
        values = [list(columns[column].values()) or [0.0] for columns in scores.values()]
        spreads = [np.std(value, ddof=1) if len(value) > 1 else 0.0 for value in values]
        axis.barh(places, [np.mean(value) for value in values], xerr=spreads, color=colours)
        axis.axvline(CHANCE[column.partition("-")[0]], color="0.4", linestyle=":")
        axis.set(title=heading, xlabel="test accuracy, %", xlim=(0, 100))
    axes[0, 0].set_yticks(places, [ROWS.get(row, row) for row in scores])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def replace_table(document: Path, table: str) -> None:
    """Insert `table` between the marker lines of a document.

    Raises:
        SystemExit: the markers are missing.
    """
    text = document.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"error: {document} needs one line {BEGIN!r} and one {END!r} after it")
    before, rest = text.split(BEGIN)
    document.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("quickstart", "benchmark"))
    parser.add_argument("folder", type=Path, help="of the runs")
    parser.add_argument("--document", type=Path, help="Markdown file to put the table into")
    parser.add_argument("--picture", type=Path, help="bars to paint")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Print the table, and write the requested files."""
    args = get_args(argv)
    if args.what == "quickstart":
        table = quickstart_table(args.folder)
    else:
        scores = collect(args.folder)
        if not scores:
            sys.exit(f"error: {args.folder} holds no results (seed-S/ROW/COLUMN/log.txt)")
        table = benchmark_table(scores)
        write_csv(scores, args.folder / "results.csv")
        if args.picture:
            paint(scores, args.picture)
    print(table)
    if args.document:
        replace_table(args.document, table)


if __name__ == "__main__":
    main()
