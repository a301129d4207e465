"""Small data of the SEVERE benchmark, in the files that the data sets are distributed with, and its scripts at work.

A pytest plugin (``pytest_plugins = "fixtures_severe"``). The lists come from scripts/data/make_lists.py. No test here:
PYTEST_DONT_REWRITE.
"""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import make_lists
import numpy as np
import pytest
import torch
from fixtures_scripts import programs_served
from fixtures_video import ROOT, source_frames, write_lines, write_mp4

from modeling_finetune import MODELS

pytest_plugins = ("fixtures_counting", "fixtures_finetuning")
SCRIPTS = ROOT / "scripts" / "severe"
CELLS = ("ssv2", "gym99", "ucf101_1k", "gym99_1k", "fx_s1", "ub_s1", "ucf_rc", "charades")
VARIABLES = ("SSV2", "GYM99", "FX_S1", "UB_S1", "UCF101", "CHARADES", "UCF_RC", "UCF_RC_VIDEOS")


# Data -----------------------------------------------------------------------------------------------------------


class Videos:
    """Writes short videos, each another part of a real one."""

    def __init__(self):
        self.frames = [source_frames(*part, (64, 48)) for part in (("bikes", 0, 200), ("carphone_pristine", 0, 90))]
        self.written = 0

    def write(self, path, seconds=0.8):
        """An avi in MPEG-4 or an mp4 in H.264."""
        path.parent.mkdir(parents=True, exist_ok=True)
        source = self.frames[self.written % 2]
        frames = np.roll(source, -7 * self.written, axis=0)[: int(25 * seconds)]
        write_mp4(path, frames, codec="mpeg4" if path.suffix == ".avi" else "libx264")
        self.written += 1


def write_ssv2(folder, videos):
    """JSON files with the template in brackets; videos `<id>.avi`, as SEVERE converts them."""
    templates = ["Spinning something that quickly stops spinning", "Holding something", "Pushing something"]
    names = [*templates, *(f"Doing {n} with something" for n in range(171))]
    prefix = folder / "annotations" / "something-something-v2-"
    prefix.parent.mkdir(parents=True)
    Path(f"{prefix}labels.json").write_text(json.dumps({name: str(n) for n, name in enumerate(names)}))
    for part, ids in {"train": range(6), "validation": range(100, 104)}.items():
        records = []
        for number in ids:
            template = templates[number % 3].replace("something", "[something]")
            records.append({"id": str(number), "label": "a cube", "template": template, "placeholders": ["cube"]})
            videos.write(folder / "videos" / f"{number}.avi")
        Path(f"{prefix}{part}.json").write_text(json.dumps(records))


def write_gym(folder, videos):
    """`A0xAXXysHUo_E_002184_002237_A_0035_0036.avi 93`; two classes of FX-S1, two of UB-S1, one of neither."""
    for part, of_class in {"train": 2, "val": 1}.items():
        lines = []
        for label in (6, 16, 74, 88, 93):
            for number in range(of_class):
                name = f"A0xAXXysHU{part[0]}_E_{label:06}_002237_A_{number:04}_0036.avi"
                videos.write(folder / "videos" / name)
                lines.append(f"{name} {label}")
        write_lines(folder / "annotations" / f"gym99_{part}.txt", lines)


def write_ucf101(folder, videos):
    """The three files of ucfTrainTestlist; file names and folders that differ in case."""
    classes = ["ApplyEyeMakeup", "HandstandPushups", *(f"Sport{n}" for n in range(99))]
    write_lines(folder / "annotations" / "classInd.txt", (f"{n} {name}" for n, name in enumerate(classes, 1)))
    for part, groups in {"train": (8, 9, 10), "test": (1, 2)}.items():
        stems = [(name, name.replace("stand", "Stand")) for name in classes[:2]]
        names = [f"{name}/v_{stem}_g{group:02}_c01.avi" for name, stem in stems for group in groups]
        for name in names:
            videos.write(folder / "videos" / name)
        ends = {"train": lambda name: f" {classes.index(name.split('/')[0]) + 1}", "test": lambda name: ""}
        write_lines(folder / "annotations" / f"{part}list01.txt", (name + ends[part](name) for name in names))


def write_charades(folder, videos):
    """The CSV files with their columns; a video with two actions at once, and one in which nothing is done."""
    write_lines(folder / "annotations" / "Charades_v1_classes.txt", (f"c{n:03} Doing {n}" for n in range(157)))
    actions = ["c092 0.00 0.40;c147 0.20 1.04", "c147 0.00 0.80", "", "c092 0.10 0.90"]
    columns = "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length"
    for part, letter in {"train": "A", "test": "B"}.items():
        lines = [columns]
        for number, found in enumerate(actions):
            videos.write(folder / "videos" / f"{letter}{number}GP8.mp4")
            row = 'GP8,S1,Kitchen,6,7,Yes,"A person stands, then sits.",chair,"x, y."'
            lines.append(f"{letter}{number}{row},{found},0.80")
        write_lines(folder / "annotations" / f"Charades_v1_{part}.csv", lines)


WRITERS = {"ssv2": write_ssv2, "finegym": write_gym, "ucf101": write_ucf101, "charades": write_charades}
LISTS = {
    "SSV2": ("ssv2",),
    "GYM99": ("finegym", "--part", "gym99"),
    "FX_S1": ("finegym", "--part", "fx-s1"),
    "UB_S1": ("finegym", "--part", "ub-s1"),
    "UCF101": ("ucf101", "--fold", "1"),
    "CHARADES": ("charades",),
}


@pytest.fixture(scope="session")
def severe_data(repetitions, tmp_path_factory):
    """The variables of run_all.sh that name data, and a model."""
    root, videos = tmp_path_factory.mktemp("severe"), Videos()
    for name, write in WRITERS.items():
        write(root / name, videos)
    for name, options in LISTS.items():
        folders = [f"--{kind}={root / options[0] / kind}" for kind in ("videos", "annotations")]
        make_lists.main([*options, *folders, "--output", str(root / "lists" / name)])
    torch.manual_seed(0)
    model = root / "model.pth"
    torch.save({"model": MODELS["vit_tiny_patch16_224"](num_classes=0).state_dict()}, model)
    counting = {"UCF_RC": str(repetitions.annotations), "UCF_RC_VIDEOS": str(repetitions.videos)}
    return {name: str(root / "lists" / name) for name in LISTS} | counting | {"MODEL_PATH": str(model)}


# Running the scripts --------------------------------------------------------------------------------------------


@pytest.fixture
def severe(severe_data, tmp_path):
    """Run a script of scripts/severe with the data: its code, what it said, and the lines of the table."""

    def run(script, *options, **variables):
        env = served | {"GPUS": "1", "BATCH_SIZE": "2", "TOTAL_BATCH": "4", "OMP_NUM_THREADS": "1"}
        env |= {"OUTPUT_DIR": str(tmp_path / "out"), **severe_data} | variables
        command = ["bash", str(SCRIPTS / script), *options]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
        return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr, table=table)

    with programs_served(tmp_path) as served:
        yield run
