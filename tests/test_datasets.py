"""Reasons for unreadable videos, frame sampling against the recipe, and the identity of samples."""

import time
from collections import Counter

import numpy as np
import pytest
import torch
from fixtures_datasets import FRAMES, GRID, SIDE, load_epoch, make_dataset
from fixtures_video import write_list

from datasets import ChunkSampler, build_loader, sample_rng
from masking_generator import num_masked
from training import epoch_batches
from video_reader import VideoError, read_frames
from video_transforms import pretrain_indices

pytest_plugins = "fixtures_datasets"


# Decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*"text empty truncated cut missing".split(), "sound only"])
def test_a_video_that_cannot_be_read(broken, name):
    """bad_clips.txt has the reason: a time or an address in it would give the file many lines for one video."""
    reasons = set()
    for pause in (0, 1.1):
        time.sleep(pause if name == "cut" else 0)
        with pytest.raises(VideoError) as error:
            read_frames(str(broken[name]), lambda total: np.arange(0, total, 3))
        reasons.add(str(error.value))
    [reason] = reasons
    assert reason and "\n" not in reason


# Which frames ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total, frames, stride", [(300, 16, 4), (64, 16, 4), (65, 16, 4), (70, 16, 4), (40, 8, 2)])
def test_long_clips_start_uniformly_and_keep_the_stride(total, frames, stride):
    rng = np.random.default_rng(0)
    last_start = total - frames * stride
    draws = 2000 if last_start > 50 else 400
    starts = Counter()
    for _ in range(draws):
        indices = pretrain_indices(rng, total, frames, stride)
        assert len(indices) == frames and (np.diff(indices) == stride).all() and indices[-1] < total
        starts[int(indices[0])] += 1
    assert set(starts) == set(range(last_start + 1))  # both ends included
    assert max(starts.values()) < 4 * draws / (last_start + 1)


@pytest.mark.parametrize("total", [1, 2, 3, 4, 5, 17, 33, 61, 62, 63])
def test_short_clips_start_at_0_and_repeat_the_last_reachable_frame(total):
    reachable = list(range(0, total, 4))[:16]
    expected = reachable + reachable[-1:] * (16 - len(reachable))
    for seed in range(20):
        assert pretrain_indices(np.random.default_rng(seed), total, 16, 4).tolist() == expected


# Samples --------------------------------------------------------------------------------------------------------


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(a, b) for key in one for a, b in zip(one[key], other[key]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_samples_do_not_depend_on_workers_or_processes(mixed_list, objects_folder):
    dataset = make_dataset(mixed_list, objects_folder, seed=3)
    alone = load_epoch(dataset, 5)
    assert len(alone) == 12 and not same(alone, load_epoch(dataset, 6))
    for num_workers in (1, 3):
        assert same(alone, load_epoch(make_dataset(mixed_list, objects_folder, seed=3), 5, num_workers))
    fresh = lambda: make_dataset(mixed_list, objects_folder, seed=3)
    one, two = (load_epoch(fresh(), 5, workers, rank=rank, world=2) for rank, workers in enumerate((0, 3)))
    assert not one.keys() & two.keys() and same(alone, one | two)


def test_a_sample_depends_on_seed_epoch_and_index(mixed_list, objects_folder):
    dataset = make_dataset(mixed_list, objects_folder, seed=3)
    first = dataset[5, 2]
    again = make_dataset(mixed_list, objects_folder, seed=3)[5, 2]
    assert np.array_equal(first["clips"], again["clips"]) and np.array_equal(first["masks"], again["masks"])
    others = [dataset[6, 2], make_dataset(mixed_list, objects_folder, seed=4)[5, 2]]
    assert all(not np.array_equal(first["clips"], other["clips"]) for other in others)
    draws = {sample_rng(*key).integers(1 << 60) for key in [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1)]}
    assert len(draws) == 4


def test_views_of_a_video_differ_and_lie_side_by_side(clips, objects_folder, tmp_path):
    path = write_list(tmp_path / "list.csv", [clips["bikes.mp4"], clips["bunny.mp4"]])
    dataset = make_dataset(path, objects_folder, num_views=3)
    loader = build_loader(dataset, ChunkSampler(2, 2), 0, False, 0)
    batch = next(iter(epoch_batches(loader, dataset.videos)))
    assert batch["clips"].dtype == torch.uint8 and batch["clips"].shape == (6, 3, FRAMES, SIDE, SIDE)
    assert batch["masks"].dtype == torch.bool and batch["masks"].shape == (6, np.prod(GRID))
    assert len(batch["paths"]) == 2 and (batch["masks"].sum(dim=1) == num_masked(GRID, 0.75)).all()
    samples = [dataset[0, index] for index in (0, 1)]
    stacked = {sample["path"]: torch.from_numpy(sample["clips"]).permute(0, 4, 1, 2, 3) for sample in samples}
    assert torch.equal(batch["clips"], torch.cat([stacked[path] for path in batch["paths"]]))
    assert torch.equal(batch["objects"], torch.cat([torch.from_numpy(sample["objects"]) for sample in samples]))
    assert batch["objects"].shape == (6, 32) and batch["objects"].any(dim=1).all() and not batch["objects"].all()
    for views, masks in zip(batch["clips"].split(3), batch["masks"].split(3)):
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert not torch.equal(views[a], views[b]) and not torch.equal(masks[a], masks[b])


def test_the_overlay_does_not_leak_into_other_views(clips, objects_folder, tmp_path):
    """An overlay writes in place: each view must have its own pixels, and the same crop without objects differs."""
    dataset = make_dataset(write_list(tmp_path / "list.csv", [clips["bikes.mp4"]]), objects_folder)
    frames = np.full((FRAMES, SIDE, SIDE, 3), 17, np.uint8)
    clip = np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8)
    dataset.view(np.random.default_rng(0), frames, clip)
    assert (frames == 17).all() and (clip != 17).any()
