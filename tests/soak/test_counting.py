"""Counting is learned: a tiny encoder, from nothing, by the program itself, on repetitions with known counts."""

import json
import os
import subprocess
import sys

import numpy as np
from fixtures_counting import write_repetitions
from fixtures_video import ROOT

pytest_plugins = "fixtures_counting"
TRAIN, HELD_OUT = (8, 10, 13, 16, 20, 25, 32), (9, 11, 14, 18, 22, 28)  # periods, frames
OPTIONS = (
    "--model vit_tiny_patch16_224 --input_size 32 --segments_per_video 10 --batch_size 16 --refine_steps 2 --epochs 8 "
    "--opt adamw --lr 0.016 --min_lr 0 --warmup_steps 50 --weight_decay 0.01 --clip_grad 1 --val_freq 8 "
    "--num_workers 0 --device cpu --log_interval 50"
)


def test_periods_that_it_has_not_seen_are_counted(objects_folder, tmp_path, figure):
    """2,400 steps on 240 videos of 2 to 8 cycles, then 30 videos of periods between; no epoch is picked by them."""
    rng = np.random.default_rng(0)
    periods = {"train": rng.choice(TRAIN, 240).tolist(), "val": list(HELD_OUT) * 5}
    data = write_repetitions(tmp_path, objects_folder, periods)
    command = [sys.executable, ROOT / "run_repetition_counting.py", "--data_path", data.annotations]
    command += ["--data_root", data.videos, *OPTIONS.split(), "--output_dir", tmp_path / "run"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([str(word) for word in command], check=True, timeout=7200, env=env)
    *epochs, result = map(json.loads, (tmp_path / "run" / "log.txt").read_text().splitlines())
    seconds = sum(line["seconds"] for line in epochs)
    figure(f"counting: mae {result['test_mae']:.3f}, off by one {result['test_obo']:.2f}, {seconds:.0f} s of training")
    assert result["test_mae"] < 0.15 and result["test_obo"] > 0.8
