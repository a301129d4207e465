"""Videos with known numbers of repetitions, in the layout and the file formats of UCFRep, for the counting program.

A pytest plugin (``pytest_plugins = "fixtures_counting"``). An object of the overlay swings over a real video. No test
here: PYTEST_DONT_REWRITE.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures_video import source_frames, write_mp4
from scipy.io import savemat

from modeling_counting import cycle_offsets
from object_overlay import paste, read_object

pytest_plugins = "fixtures_video"
SIZE = (64, 48)  # width, height of the videos, pixels


def write_annotation(path, bounds, start, end):
    """A file as UCFRep has them; `bounds`, `start` and `end` are frames numbered from 1."""
    offsets = np.full((2, end - start + 1), -1.0)
    known = cycle_offsets(torch.tensor(bounds)).numpy().T
    offsets[:, bounds[0] - start : bounds[-1] - start + 1] = known
    label = {
        "duration": float(end - start + 1),
        "start_frame": float(start),
        "end_frame": float(end),
        "temporal_bound_num": float(len(bounds)),
        "temporal_bound": np.array(bounds, float)[:, None],
        "offset_next_estimate": offsets[1:],
        "offset_pre_estimate": offsets[:1],
    }
    savemat(path, {"label": label}, do_compression=True)


def swing(rng, frames, sprite, bounds):
    """Let an object swing once in each cycle, in place, about the middle of frames uint8 [F, H, W, 3]."""
    height, width = frames.shape[1:3]
    phase = np.interp(np.arange(len(frames)), bounds, np.arange(len(bounds)))
    side = rng.uniform(0.45, 0.6) * height
    angle = rng.uniform(0, 2 * np.pi)
    reach = np.array([np.cos(angle), np.sin(angle)]) * (np.array([width, height]) - side) / 2
    centre = np.array([width, height]) / 2 + np.sin(2 * np.pi * (phase + rng.random()))[:, None] * reach
    boxes = np.concatenate([np.rint(centre - side / 2), np.rint(centre + side / 2)], axis=1).astype(int)
    paste(frames, sprite, boxes, np.zeros(len(frames)))


def background(rng, videos, length):
    """`length` frames of one of `videos`: a random part of it, or all of it slowed down."""
    video = videos[rng.integers(len(videos))]
    if len(video) >= length:
        return video[rng.integers(len(video) - length + 1) :][:length].copy()
    return video[np.arange(length) * len(video) // length].copy()


def write_repetitions(folder, objects, splits, seed=0):
    """Write data in the layout of UCFRep and UCF101.

    Args:
        objects: folder of object images.
        splits: name of a split → periods of its videos, frames; each has 2 to 8 cycles of that length.
    """
    rng = np.random.default_rng(seed)
    videos = [source_frames(*part, SIZE) for part in (("bikes", 0, 200), ("bigbuckbunny", 0, 120))]
    videos.append(source_frames("carphone_pristine", 0, 90, SIZE))
    sprites = [read_object(str(path), 64) for path in sorted(Path(objects).glob("*/[0-9].png"))]
    (folder / "UCF-101" / "HandstandPushups").mkdir(parents=True)
    for split, periods in splits.items():
        (folder / "annotations" / split).mkdir(parents=True)
        for number, period in enumerate(periods):
            name = f"v_HandStandPushups_g{number:02}_c{1 + (split == 'val'):02}"
            bounds = np.arange(rng.integers(3, 10)) * period
            frames = background(rng, videos, bounds[-1] + 1)
            swing(rng, frames, sprites[rng.integers(len(sprites))], bounds)
            write_mp4(folder / "UCF-101" / "HandstandPushups" / f"{name}.mp4", frames)
            write_annotation(
                folder / "annotations" / split / f"{name}.mat", (bounds + 1).tolist(), 1, int(bounds[-1]) + 1
            )
    return SimpleNamespace(annotations=folder / "annotations", videos=folder / "UCF-101")


@pytest.fixture(scope="session")
def repetitions(objects_folder, tmp_path_factory):
    """Six videos to train on, three to count, of other periods."""
    splits = {"train": [6, 8, 10, 12, 14, 16], "val": [7, 9, 13]}
    return write_repetitions(tmp_path_factory.mktemp("repetitions"), objects_folder, splits)
