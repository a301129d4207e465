"""The scripts of the SEVERE benchmark on small data in the real formats: to the table; what is missing or broken; the
table and the picture by themselves.
"""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import severe_table
from fixtures_pictures import check_texts
from fixtures_programs import log_of, write_log
from fixtures_severe import CELLS, SCRIPTS, VARIABLES
from fixtures_video import write_lines

from options_finetune import get_args
from run_class_finetuning import train_videos
from utils import RunError

pytest_plugins = "fixtures_severe"
MODEL = ["--model", "vit_tiny_patch16_224", "--input_size", "32", "--num_frames", "4"]
TINY = [*MODEL, "--num_workers", "0", "--epochs", "1", "--log_interval", "1"]
OPTIONS = {
    "CLASS_OPTIONS": "--sampling_rate 1 --test_num_segment 2 --test_num_crop 1 --val_freq 1",
    "COUNT_OPTIONS": "--segments_per_video 1 --refine_steps 2 --max_frames 40",
}
KEYS = {cell: {"ucf_rc": "test_mae", "charades": "test_map"}.get(cell, "test_acc1") for cell in CELLS}
GYM = ("gym99", "gym99_1k", "fx_s1", "ub_s1")
PRINTED = (57.6, 52.1, 58.8, 62.2, 64.2, 65.0, 64.9, 67.9)  # the means of the paper's table


def figures(folder):
    """The last test of each cell."""
    return {cell: log_of(folder / cell)[-1] for cell in CELLS if (folder / cell / "log.txt").exists()}


def test_all_cells_run_to_the_table(severe, severe_data, tmp_path):
    found = severe("run_all.sh", *TINY, **OPTIONS)
    assert found.code == 0 and "without a result" not in found.out, found.out + found.err
    tests, table = figures(tmp_path / "out"), found.table[-15:]
    assert tuple(tests) == CELLS and table[0][:3] == ["cell", "metric", "ours"]
    rows = iter(table[2:])
    for cell in CELLS:
        digits = 3 if cell == "ucf_rc" else 1
        assert next(rows)[2] == f"{tests[cell][KEYS[cell]]:.{digits}f}"
        if cell in GYM:
            assert next(rows)[1:3] == ["class-mean top-1", f"{tests[cell]['test_class_acc1']:.1f}"]
    counting = 100 * (1 - tests["ucf_rc"]["test_mae"])
    others = [tests[cell][KEYS[cell]] for cell in CELLS if cell != "ucf_rc"]
    mean = next(rows)
    assert mean[0] == "mean" and mean[2] == f"{(sum(others) + counting) / 8:.1f}"
    with open(tmp_path / "out" / "severe.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert [line[:3] for line in lines[1:]] == [row[:3] for row in table[2:]]
    assert (tmp_path / "out" / "severe.png").stat().st_size > 10000
    for cell, total in {"ucf101_1k": 6, "gym99_1k": 10}.items():
        assert len((tmp_path / "out" / cell / "train_subset.csv").read_text().splitlines()) == total
    assert tests["gym99"]["test_videos"] == 5 and tests["fx_s1"]["test_videos"] == tests["ub_s1"]["test_videos"] == 2
    assert tests["charades"]["test_classes"] == 2 and tests["charades"]["test_views"] == 8

    again = severe("run_all.sh", *TINY, **OPTIONS)  # nothing is left to do
    assert again.code == 0 and again.out.count(": done, in ") == 8 and again.table == found.table[-15:]
    shutil.copy(severe_data["MODEL_PATH"], tmp_path / "other.pth")  # not to be given the figures of the first one
    other = severe("run_all.sh", *TINY, **OPTIONS, MODEL_PATH=str(tmp_path / "other.pth"))
    assert other.code == 1 and re.search(f"not of {tmp_path / 'other.pth'} .*: choose another OUTPUT_DIR", other.err)
    shutil.copy(severe_data["MODEL_PATH"], tmp_path / "model.pth")
    known = tmp_path / "out" / "fx_s1" / "model_path.txt"
    known.write_text(known.read_text().replace(severe_data["MODEL_PATH"], str(tmp_path / "model.pth")))
    here = {"CELLS": "fx_s1", "MODEL_PATH": str(tmp_path / "model.pth")}
    assert severe("run_all.sh", *TINY, **OPTIONS | here).code == 0
    (tmp_path / "model.pth").write_bytes((tmp_path / "model.pth").read_bytes() + b" ")  # other weights of that name
    other = severe("run_all.sh", *TINY, **OPTIONS | here)
    assert other.code == 1 and "choose another OUTPUT_DIR" in other.err
    known.write_text(known.read_text().replace(str(tmp_path / "model.pth"), severe_data["MODEL_PATH"]))
    other = severe("run_all.sh", *TINY, "--seed", "1", **OPTIONS)
    assert other.code == 1 and "--seed 1" in other.err and "choose another OUTPUT_DIR" in other.err


def test_cells_are_tried_without_writing(severe, tmp_path):
    """In two processes each."""
    cells = {"CELLS": "ssv2 ucf101_1k ucf_rc charades", "GPUS": "2", "BATCH_SIZE": "2"}
    found = severe("run_all.sh", *TINY, "--dry_run", **OPTIONS, **cells)
    assert found.code == 0 and found.out.count("steps went well") == 4, found.out + found.err
    assert {path.name for path in (tmp_path / "out").glob("*/*")} == {"output.txt"}
    assert {row[2] for row in found.table[-4:]} == {"–"}


def test_it_goes_on_after_cells_that_cannot_be_run(severe, severe_data, tmp_path):
    """A list with a line without actions, an annotation that is something else, a wrong list, and no folder."""
    broken = {name: tmp_path / name for name in ("CHARADES", "UCF_RC", "FX_S1")}
    for name, folder in broken.items():
        shutil.copytree(severe_data[name], folder)
    lines = (broken["CHARADES"] / "train.csv").read_text().splitlines()
    (broken["CHARADES"] / "train.csv").write_text("\n".join([lines[0], lines[1].rpartition(" ")[0]]))
    mat = sorted((broken["UCF_RC"] / "train").glob("*.mat"))[2]
    mat.write_bytes(b"no annotation")
    (broken["FX_S1"] / "val.csv").write_text("<html>not found</html>\n")
    cells = {"CELLS": "charades ucf_rc fx_s1 gym99 ub_s1", "GYM99": "/path/to/gym99"}
    found = severe("run_all.sh", *TINY, **OPTIONS, **cells, **{name: str(folder) for name, folder in broken.items()})
    assert found.code == 1 and "Traceback" not in found.out, found.out
    said = found.out.split("without a result:\n")[1].splitlines()
    assert [line.split(":")[0].strip() for line in said] == ["charades", "ucf_rc", "fx_s1", "gym99"]
    assert f"{broken['CHARADES']}/train.csv, line 2: " in said[0] and "not `path label`" in said[0]
    assert f"{mat}: not an annotation of UCFRep" in said[1]
    assert f"{broken['FX_S1']}/val.csv, line 1: " in said[2] and "is not a whole number" in said[2]
    assert said[3].strip() == "gym99: left out, GYM99=/path/to/gym99: no such folder"
    ours = {row[0]: row[2] for row in found.table[-8:] if row[0]}
    assert ours["UB-S1"] != "–" and all(ours[name] == "–" for name in ("Gym-99", "FX-S1", "UCF-RC", "Charades"))
    assert "mean" not in ours


def test_without_any_data_it_says_so(severe, tmp_path):
    (tmp_path / "a model").mkdir()  # of transformers
    (tmp_path / "a model" / "model.safetensors").write_bytes(b"weights")
    found = severe("run_all.sh", **dict.fromkeys(VARIABLES, "/no"), MODEL_PATH=str(tmp_path / "a model"))
    assert found.code == 0 and "without a result" in found.out, found.err
    found = severe("run_all.sh", **dict.fromkeys(VARIABLES, "/path/to/nothing"))
    assert found.code == 0 and found.out.count("no such folder") == 16 and found.err == ""
    found = severe("run_all.sh", MODEL_PATH="/no/model.pth")
    assert found.code == 1 and found.err.startswith("error: MODEL_PATH=/no/model.pth: no such file")
    found = severe("run_all.sh", CELLS="ssv2 k400")
    assert found.code == 1 and found.err.startswith("error: CELLS: no cell k400; there are")


def draw_by_the_rule(labels, k):
    """Indices that the benchmark draws, by its rule: k of a permutation for each class, one stream for all."""
    stream, drawn = np.random.RandomState(99999), []
    for label in sorted(set(labels)):
        of_class = [index for index, other in enumerate(labels) if other == label]
        drawn += [of_class[place] for place in stream.permutation(len(of_class))[:k]]
    return drawn


@pytest.mark.parametrize(
    "data_set, classes, smallest, videos, k, total",
    [("UCF101", 101, 72, 9537, 10, 1010), ("Gym99", 99, 47, 20484, 11, 1089)],
)
def test_the_draw_is_the_benchmarks(tmp_path, caplog, data_set, classes, smallest, videos, k, total):
    """On lists as long as the real ones, with classes at least as large as the smallest of the real ones."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), smallest)
    labels = rng.permutation(np.append(labels, rng.integers(0, classes, videos - len(labels))))
    lines = [f"v_{index:05}.avi {label}" for index, label in enumerate(labels)]
    write_lines(tmp_path / "train.csv", lines)
    given = ["--data_set", data_set, "--data_path", str(tmp_path), "--examples", "1000", "--seed", "7"]
    args = get_args([*given, "--output_dir", str(tmp_path)])
    drawn = train_videos(args)
    expected = [lines[index] for index in draw_by_the_rule(labels.tolist(), k)]
    assert (tmp_path / "train_subset.csv").read_text().splitlines() == expected and len(drawn) == total
    assert (np.bincount(drawn.labels) == k).all() and "not its subset" not in caplog.text
    write_lines(tmp_path / "train.csv", lines[1:])
    train_videos(args)
    assert f"train.csv has {videos - 1} videos, SEVERE draws from {videos}: not its subset" in caplog.text


def test_a_missing_video_is_reported_before_the_draw(severe, severe_data, tmp_path):
    """Though --max_bad_fraction would have let it pass."""
    folder = Path(shutil.copytree(severe_data["UCF101"], tmp_path / "UCF101"))
    lines = (folder / "train.csv").read_text().splitlines()
    (folder / "train.csv").write_text("\n".join([*lines[:4], "/no/v.avi 1", *lines[5:]]))
    given = {"DATA_PATH": str(folder), "OUTPUT_DIR": str(tmp_path / "out")}
    found = severe("ucf101_1k.sh", *TINY, "--max_bad_fraction", "1", **given)
    said = f"{folder}/train.csv, line 5: no such file: /no/v.avi (1 of {len(lines)} are missing); what --examples draws"
    assert found.code == 1 and said in found.err and not (tmp_path / "out" / "train_subset.csv").exists()


def test_ours_beside_the_papers(tmp_path, capsys):
    """The last test of a log counts; ours has a mean only if all eight are there, the papers' are those they print."""
    means = [severe_table.mean(dict(zip(CELLS, row))) for row in severe_table.PAPER.values()]
    assert tuple(severe_table.CELLS) == CELLS
    np.testing.assert_allclose(means, PRINTED, atol=0.051)
    lines = [{"epoch": 0, "val_acc1": 1.0}, {"test_acc1": 2.0, "test_class_acc1": 3.0}]
    logs = {
        "gym99": [*lines, {"test_acc1": 88.25, "test_class_acc1": 80.0}],
        "ucf_rc": [{"test_mae": 0.1666, "test_obo": 0.5}],
        "ssv2": lines[:1],
    }
    runs = [f"{cell}={write_log(tmp_path / f'of {cell}', *lines)}" for cell, lines in logs.items()]
    severe_table.main([*runs, "--csv", str(tmp_path / "severe.csv")])
    out = capsys.readouterr().out
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if "|" in line][2:]
    assert [row[:4] for row in table] == [
        ["SSv2", "top-1", "–", "68.6"],
        ["Gym-99", "top-1", "88.2", "86.6"],
        ["", "class-mean top-1", "80.0", ""],
        ["UCF-RC", "counting error (lower is better)", "0.167", "0.172"],
    ]
    assert out.rstrip().splitlines()[-1].startswith("*: the SMILE paper's figures")
    rest = [f"{cell}={tmp_path / cell}" for cell in CELLS if cell not in ("gym99", "ucf_rc", "ssv2")]
    severe_table.main([*runs, *rest])
    assert "| mean |  | – | 57.6 | 52.1 |" in capsys.readouterr().out


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        severe_table.main(["fx-s1=x"])
    assert "fx-s1=x: not CELL=FOLDER" in capsys.readouterr().err
    (tmp_path / "log.txt").write_text("not a log\n{}\n")
    with pytest.raises(RunError, match="log.txt, line 1: not a line of the log of a run"):
        severe_table.main([f"ssv2={tmp_path}"])


@pytest.mark.parametrize("ours", [{}, {"ssv2": 40.0, "ucf_rc": 0.9}, dict(zip(CELLS, severe_table.PAPER["MME"]))])
def test_no_text_of_the_picture_covers_another(ours):
    texts = check_texts(severe_table.radar(ours))
    assert ("ours" in texts) == bool(ours) and sum(text.endswith("(the paper's)") for text in texts) == 4
    heads = {text.split("\n")[0]: text.split("\n")[1] for text in texts if "\n" in text}
    assert len(heads) == 8 and heads["SSv2"] == ("40.0 – 72.1" if ours.get("ssv2") == 40 else "68.6 – 72.1")
    assert heads["UCF-RC"].endswith(" – 0.155" if len(ours) == 8 else " – 0.169")  # the best is the lowest


def test_a_point_is_where_its_figure_belongs():
    assert sorted(path.stem for path in Path(SCRIPTS).glob("*.sh")) == sorted([*CELLS, "run_all"])
    axes = severe_table.radar({"ssv2": 70.35}).axes[0]
    line = next(line for line in axes.lines if line.get_label() == "ours")
    assert line.get_ydata() == pytest.approx([0.25 + 0.75 / 2])  # half way from 68.6 to 72.1
    smile = next(line for line in axes.lines if line.get_label().startswith("SMILE ("))
    assert smile.get_ydata()[:6] == pytest.approx([1] * 6) and len(smile.get_ydata()) == 9  # closed
