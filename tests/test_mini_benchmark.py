"""The mini benchmark: every row's commands are understood, what is done is not done again, logs become tables.

In place of `python` stands a stub: it notes each training command, and leaves what the program would leave.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures_programs import write_log

import run_class_finetuning
import run_smile_pretraining

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "mini"))
import results

ROOT = Path(__file__).resolve().parents[1]
STUB = f"""#!{sys.executable}
import json, os, sys
from pathlib import Path
name, argv = os.path.basename(sys.argv[1]), sys.argv[2:]
if name == "results.py":
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
if name == "-c":
    print("0 2")  # no GPU, two cores
if name == "make_world.py":
    (Path(argv[0]) / "pretrain").mkdir(parents=True, exist_ok=True)
    (Path(argv[0]) / "pretrain" / "train.csv").write_text("clip.mp4 -1\\n" * 600)
if not name.startswith("run_"):
    sys.exit(0)
value = lambda flag: argv[len(argv) - argv[::-1].index(flag)]
folder = Path(value("--output_dir"))
folder.mkdir(parents=True, exist_ok=True)
with open(os.environ["STUB_LOG"], "a") as log:
    log.write(json.dumps([name, *argv]) + "\\n")
if name == "run_class_finetuning.py":
    (folder / "log.txt").write_text(json.dumps({{"test_acc1": 12.5, "test_videos": 400}}) + "\\n")
else:
    (folder / f"checkpoint-{{int(value('--epochs')) - 1}}.pth").touch()
"""


@pytest.fixture
def benchmark(tmp_path):
    """A function that runs run_benchmark.sh; gives the training commands it started and its output."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    log, out = tmp_path / "commands", tmp_path / "the results"

    def call(*argv, **variables):
        log.write_text("")
        env = {"PATH": f"{stub.parent}:{os.environ['PATH']}", "STUB_LOG": str(log), "OUT": str(out), "JOBS": "1"}
        script = str(ROOT / "scripts" / "mini" / "run_benchmark.sh")
        done = subprocess.run(["bash", script, *argv], env=env | variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in log.read_text().splitlines()], done.stdout

    call.out = out
    return call


def parsed(commands, name):
    """Folder below ``seed-0`` → arguments, of the commands of a program."""
    program = {"run_class_finetuning.py": run_class_finetuning, "run_smile_pretraining.py": run_smile_pretraining}[name]
    arguments = [program.get_args(command[1:]) for command in commands if command[0] == name]
    return {args.output_dir.split("seed-0/")[1]: args for args in arguments}


def test_rows_are_what_they_are_called_and_cost_the_same(benchmark):
    commands, output = benchmark(SEEDS="0", STEPS="900")
    runs = parsed(commands, "run_smile_pretraining.py")
    stage1 = ("timm", True, "tubelet", "train.csv", "")
    kinds = {
        name: (args.target_type, args.add_tubelets, args.mask_type, Path(args.data_path).name, args.first_stage_path)
        for name, args in runs.items()
    }
    first = {
        row: str(benchmark.out / "seed-0" / row / "first" / "checkpoint-2.pth")
        for row in ("two-stages", "two-stages-tube", "pixel-two-stages")
    }
    assert kinds == {
        "stage1/pretraining": stage1,
        "pixel-tube/pretraining": ("pixel", False, "tube", "train.csv", ""),
        "pixel-overlay-tube/pretraining": ("pixel", True, "tube", "train.csv", ""),
        "teacher-tube/pretraining": ("timm", False, "tube", "train.csv", ""),
        "teacher-overlay-tube/pretraining": ("timm", True, "tube", "train.csv", ""),
        "black/pretraining": ("timm", True, "tubelet", "black.csv", ""),
        "two-stages/first": stage1,
        "two-stages/pretraining": ("timm", False, "tube", "train.csv", first["two-stages"]),
        "two-stages-tube/first": ("timm", True, "tube", "train.csv", ""),
        "two-stages-tube/pretraining": ("timm", False, "tube", "train.csv", first["two-stages-tube"]),
        "pixel-two-stages/first": ("pixel", True, "tubelet", "train.csv", ""),
        "pixel-two-stages/pretraining": ("pixel", False, "tube", "train.csv", first["pixel-two-stages"]),
    }
    assert {args.epochs for name, args in runs.items() if "two-stages" not in name} == {6}  # of 150 steps
    assert {args.epochs for name, args in runs.items() if "two-stages" in name} == {3}
    assert len({(args.batch_size, args.lr, args.mask_ratio, args.num_sample, args.seed) for args in runs.values()}) == 1

    tests = parsed(commands, "run_class_finetuning.py")
    probes = {column for column in results.COLUMNS if column.endswith("-probe")}
    usual = set(results.COLUMNS) - {"composition"}  # has to be asked for
    columns = {row: probes if row == "teacher" else usual for row in results.ROWS}
    assert set(tests) == {f"{row}/{column}" for row in columns for column in columns[row]}
    for name, args in tests.items():
        row, column = name.split("/")
        assert args.samples_per_class == {"motion-few": 50, "object-few": 10}.get(column, 0)
        if row == "teacher":
            assert args.encoder == "tf_efficientnet_lite0" and args.attentive_probe and not args.finetune
            continue
        assert Path(args.data_path).name == column.split("-")[0]
        assert args.attentive_probe == column.endswith("-probe")
        assert not run_class_finetuning.DATA_SETS[args.data_set].flip, "left and right are labels"
        assert (row in args.finetune) == (row != "scratch" or args.attentive_probe)
    assert "| from scratch | 12.5 | 12.5 | 12.5 | 12.5 | 12.5 | 12.5 |" in output


def test_what_is_done_is_not_done_again_and_a_row_of_ones_own_is_one_more(benchmark):
    assert len(benchmark("scratch", SEEDS="0 1")[0]) == 12
    assert benchmark("scratch", SEEDS="0 1")[0] == []
    (benchmark.out / "seed-1" / "scratch" / "count" / "log.txt").unlink()
    commands, _ = benchmark("scratch", SEEDS="0 1")
    assert [command[-1].split("seed-")[1] for command in commands] == ["1/scratch/count"]
    commands, output = benchmark("less-hidden", "--mask_ratio", "0.6", SEEDS="0")
    runs = parsed(commands, "run_smile_pretraining.py")
    assert list(runs) == ["less-hidden/pretraining"]
    assert runs["less-hidden/pretraining"].mask_ratio == 0.6 and runs["less-hidden/pretraining"].mask_type == "tubelet"
    assert "| less-hidden | 12.5 |" in output and "12.5 ± 0.0" in output


def test_tables_come_from_logs(tmp_path, capsys):
    for seed, values in {1: (40, 50), 2: (44, 56), 10: (48, 62)}.items():
        for column, value in zip(("motion", "object-few"), values):
            lines = {"train_loss": 1.0}, {"test_acc1": value, "test_videos": 400}
            write_log(tmp_path / f"seed-{seed}" / "stage1" / column, *lines)
    document = tmp_path / "doc.md"
    document.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    picture = tmp_path / "bars.png"
    results.main(["benchmark", str(tmp_path), "--document", str(document), "--picture", str(picture)])
    row = f"| {results.ROWS['stage1']} | 44.0 ± 4.0 | 56.0 ± 6.0 |"  # sample deviations of 40 44 48, 50 56 62
    assert row in capsys.readouterr().out and row in document.read_text()
    assert document.read_text().startswith("before\n") and document.read_text().endswith("after\n")
    assert "old" not in document.read_text() and picture.stat().st_size > 1000
    with open(tmp_path / "results.csv") as file:
        assert list(csv.reader(file))[1:3] == [["stage1", "motion", "1", "40.000"], ["stage1", "motion", "2", "44.000"]]


def test_the_quickstart_gives_standard_errors_and_names_a_run_that_is_not_done(tmp_path, capsys):
    for name in ("finetuned", "scratch", "count", "count-scratch"):
        write_log(tmp_path / name, {"test_acc1": 20.0, "test_videos": 400})
    for stage in ("stage1", "stage2"):
        write_log(tmp_path / stage, {"train_loss": 0.876})
    results.main(["quickstart", str(tmp_path)])
    table = capsys.readouterr().out
    assert table.count("| **20.0** | 2.0 | 400 |") == 4  # 100 · sqrt(.2 · .8 / 400)
    assert "0.88 after stage 1" in table
    (tmp_path / "scratch" / "log.txt").unlink()
    with pytest.raises(SystemExit, match=r"scratch/log.txt holds no test score"):
        results.main(["quickstart", str(tmp_path)])
