"""A loader worker does not grow."""

from pathlib import Path

import numpy as np
import pytest
from fixtures_video import video_list
from PIL import Image

from datasets import ChunkSampler, PretrainDataset, build_loader
from masking_generator import MaskGenerator
from object_overlay import ObjectLibrary, ObjectOverlay, find_objects
from soak.runs import make_videos
from training import epoch_batches
from video_transforms import ClipSource

SIDE, FRAMES, CLIPS = 64, 8, 3000


def memory(pid, names=("Rss", "Pss", "Private_Dirty")):
    """MiB of a process, by kind."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    return {name: sizes[name] for name in names}


@pytest.fixture(scope="module")
def list_file(tmp_path_factory):
    """3000 lines, of 60 videos."""
    folder = tmp_path_factory.mktemp("videos")
    names = Path(make_videos(folder, 60)).read_text().splitlines()
    path = folder / "long.csv"
    path.write_text("\n".join(names * (CLIPS // 60)) + "\n")
    return path


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """100 object images of different sizes."""
    root, rng = tmp_path_factory.mktemp("objects"), np.random.default_rng(0)
    (root / "noise").mkdir()
    for number in range(100):
        pixels = rng.integers(0, 256, (40 + number, 60, 4), np.uint8)
        Image.fromarray(pixels, "RGBA").save(root / "noise" / f"{number}.png")
    return root


def test_a_worker_after_3000_clips(list_file, objects, figure):
    overlay = ObjectOverlay((SIDE, SIDE), ObjectLibrary(str(objects), find_objects(str(objects)), max_side=91))
    videos = video_list(str(list_file))
    masks = MaskGenerator("tubelet", (FRAMES // 2, 4, 4), 0.75)
    dataset = PretrainDataset(videos, ClipSource((SIDE, SIDE), FRAMES, 1), masks, overlay)
    sampler = ChunkSampler(len(videos), 1)
    loader = build_loader(dataset, sampler, 1, False, 120)
    sizes = {}
    for number, _ in enumerate(epoch_batches(loader, videos), 1):
        if number in (10, 300, CLIPS // 2, CLIPS):
            worker = loader._iterator._workers[0].pid
            sizes[number] = memory(worker) | {"files": len(list(Path(f"/proc/{worker}/fd").iterdir()))}
    figure(
        "MiB of a worker: "
        + "; ".join(
            f"after {number} clips " + ", ".join(f"{name} {size:.1f}" for name, size in kinds.items())
            for number, kinds in sizes.items()
        )
    )
    for name, size in sizes[CLIPS // 2].items():  # by then the allocator has what it needs
        assert sizes[CLIPS][name] < 1.05 * size, name
    assert sizes[CLIPS]["files"] == sizes[300]["files"]
