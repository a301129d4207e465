"""Small pretraining datasets for the tests, and their samples as a loader gives them.

A pytest plugin (``pytest_plugins = "fixtures_datasets"``). No test here: PYTEST_DONT_REWRITE.
"""

import pytest
import torch
from fixtures_video import video_list, write_list

from datasets import ChunkSampler, PretrainDataset, build_loader
from masking_generator import MaskGenerator
from object_overlay import ObjectLibrary, ObjectOverlay, find_objects
from training import epoch_batches
from video_transforms import ClipSource

pytest_plugins = "fixtures_video"
GRID, FRAMES, SIDE = (2, 4, 4), 4, 64


def make_dataset(list_path, objects=None, **options):
    """Clips of 4 frames, 64 px; with `objects` as in stage 1, else as in stage 2."""
    overlay, mask = None, "tube"
    if objects:
        overlay, mask = ObjectOverlay((SIDE, SIDE), ObjectLibrary(str(objects), find_objects(str(objects)))), "tubelet"
    source = ClipSource((SIDE, SIDE), FRAMES, 2)
    return PretrainDataset(video_list(list_path), source, MaskGenerator(mask, GRID, 0.75), overlay, **options)


@pytest.fixture
def mixed_list(clips, broken, tmp_path):
    """12 lines; lines 3 and 8 (from 0) are unreadable."""
    good = list(clips.values())
    return write_list(tmp_path / "mixed.csv", [*good[:3], broken["text"], *good, broken["missing"], good[0]])


def load_epoch(dataset, epoch, num_workers=0, chunk=2, **split):
    """All samples of an epoch, in the order the loader gives them: (key, clip, mask)."""
    sampler = ChunkSampler(len(dataset), chunk, seed=7, **split)
    sampler.set_position(epoch)
    keys = [key for keys in list(sampler) for key in keys]
    loader = build_loader(dataset, sampler, num_workers, False, 60)
    batches = list(epoch_batches(loader, dataset.videos))
    assert all(len(batch["paths"]) == chunk for batch in batches)
    clips = torch.cat([batch["clips"] for batch in batches])
    masks = torch.cat([batch["masks"] for batch in batches])
    assert len(clips) == len(masks) == len(keys)
    return dict(zip(keys, zip(clips, masks)))
