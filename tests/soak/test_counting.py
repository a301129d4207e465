"""Counting learned from scratch: swinging objects over real videos, with periods that training has not seen."""

import json
import subprocess
import sys

import numpy as np
from fixtures_counting import write_repetitions

from soak.runs import ROOT

pytest_plugins = "fixtures_counting"
OPTIONS = (
    "--model vit_tiny_patch16_224 --input_size 32 --device cpu --num_workers 1 --batch_size 16 --segments_per_video 2"
)
RECIPE = "--opt adamw --lr 16e-3 --min_lr 8e-4 --warmup_epochs 1 --clip_grad 1 --weight_decay 0.01 --epochs 12"


def test_counts_of_periods_that_were_not_seen(objects_folder, tmp_path, figure):
    """No epoch is chosen by what it counts: only the last one is validated."""
    rng = np.random.default_rng(0)
    splits = {"train": rng.choice([8, 10, 13, 16, 20, 25, 32], 120), "val": rng.choice([9, 11, 14, 18, 22, 28], 30)}
    data = write_repetitions(tmp_path, objects_folder, splits)
    command = [sys.executable, "run_repetition_counting.py", *OPTIONS.split(), *RECIPE.split(), "--val_freq", "1000"]
    paths = ["--data_path", data.annotations, "--data_root", data.videos, "--output_dir", tmp_path / "run"]
    found = subprocess.run([*command, *map(str, paths)], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    *epochs, test = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    minutes = sum(line["seconds"] for line in epochs) / 60
    figure(
        f"counting, trained for {minutes:.1f} min: mae {test['test_mae']:.3f}, off by one {test['test_obo']:.3f}, "
        f"of {len(splits['val'])} videos with periods that were not seen"
    )
    assert test["test_mae"] < 0.15 and test["test_obo"] > 0.8
