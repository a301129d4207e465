"""Demo data: lists, labels, clips that decode, objects with soft edges, the same from the same seed."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import make_demo_data

from datasets import VideoList, read_frames
from object_overlay import find_objects, read_object


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo data")  # with a space
    make_demo_data.main(["--output", str(folder), "--clips", "6", "--objects", "16", "--size", "48"])
    return folder


def test_lists_and_clips(demo):
    lists = {split: VideoList(str(demo / "labelled" / f"{split}.csv"), 3) for split in ("train", "val", "test")}
    assert {split: len(videos) for split, videos in lists.items()} == {"train": 6, "val": 3, "test": 3}
    for videos in lists.values():
        assert set(videos.labels) == {0, 1, 2}
        for index in range(len(videos)):
            frames = read_frames(videos.path(index), lambda total: np.arange(total))
            assert 16 <= len(frames) <= 48 and min(frames.shape[1:3]) == 48
            assert frames.std() > 10  # a picture, not a blank
    pretrain = VideoList(str(demo / "pretrain" / "train.csv"))
    assert [pretrain.path(i) for i in range(6)] == [lists["train"].path(i) for i in range(6)]
    assert (demo / "labelled" / "classes.txt").read_text().split() == list(make_demo_data.FAMILIES)


def test_splits_share_no_frames():
    ranges = sorted(make_demo_data.SPLITS.values())
    assert ranges[0][0] == 0 and ranges[-1][1] == 1
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ranges))


def test_objects(demo):
    names = find_objects(str(demo / "objects"))
    assert len(names) == 16 and {name.split("/")[0] for name in names} == set(make_demo_data.SHAPES)
    for name in names:
        alpha = np.asarray(Image.open(demo / "objects" / name))[..., 3]
        assert alpha.max() == 255 and alpha.min() == 0 and ((alpha > 0) & (alpha < 255)).mean() > 0.01
        assert 0.1 < (alpha > 127).mean() < 0.95
        read_object(str(demo / "objects" / name), 160)


def test_objects_depend_on_the_seed_alone(demo, tmp_path):
    for seed in (0, 1):
        make_demo_data.make_objects(tmp_path / str(seed), 8, np.random.default_rng((seed, 1)))
    pictures = [
        (folder / "objects" / "star" / "0.png").read_bytes() for folder in (demo, tmp_path / "0", tmp_path / "1")
    ]
    assert pictures[0] == pictures[1] != pictures[2]
