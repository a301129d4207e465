"""Lists, decoding against PyAV, frame sampling against the recipe, and (data_loading.py) the order and identity of samples,
bad files, and workers that fail.
"""

import multiprocessing
import os
import time
from collections import Counter

import numpy as np
import pytest
import torch
from fixtures_video import decode_all, in_child, write_list
from torch.utils.data import Dataset

from data_loading import BadFiles, ChunkSampler, build_loader, epoch_batches
from datasets import (MAX_BAD_IN_A_ROW, PretrainDataset, VideoError, VideoList, pretrain_indices, read_frames,
                      sample_rng)
from masking_generator import MaskGenerator, num_masked
from object_overlay import ObjectLibrary, ObjectOverlay, find_objects
from utils import RunError, run_main

pytest_plugins = "fixtures_video"
GRID, FRAMES, SIDE = (2, 4, 4), 4, 64


# Lists ----------------------------------------------------------------------------------------------------------


def test_a_list_with_spaces_blank_lines_and_negative_labels(tmp_path):
    (tmp_path / "list.csv").write_text("/a/one two.mp4 3\n\n   \nb/c d/e  f.avi -1  \n\xe9t\xe9.mp4 0\n", "utf-8")
    videos = VideoList(str(tmp_path / "list.csv"))
    assert [videos.path(i) for i in range(len(videos))] == ["/a/one two.mp4", "b/c d/e  f.avi", "\xe9t\xe9.mp4"]
    assert videos.labels.tolist() == [3, -1, 0]


def test_data_root_is_put_before_relative_paths_only(tmp_path):
    path = write_list(tmp_path / "list.csv", ["/abs/x.mp4", "rel/y z.mp4"])
    videos = VideoList(path, data_root="/root dir")
    assert [videos.path(i) for i in range(2)] == ["/abs/x.mp4", "/root dir/rel/y z.mp4"]


@pytest.mark.parametrize("line", ["c.mp4", "c.mp4,1", "c.mp4 one", "c.mp4 1.5", "7", "c.mp4 --1", "c.mp4\t1",
                                  "c.mp4 -", "c.mp4 \xb2"])
def test_a_line_without_a_label_is_named_by_its_number(tmp_path, line):
    (tmp_path / "list.csv").write_text(f"a.mp4 0\n\n{line}\nb.mp4 1\n")
    with pytest.raises(ValueError, match="list.csv, line 3: "):
        VideoList(str(tmp_path / "list.csv"))


@pytest.mark.parametrize("label", [-1, 2, 99])
def test_a_label_out_of_range_is_named_by_its_number(tmp_path, label):
    (tmp_path / "list.csv").write_text(f"a.mp4 0\nb.mp4 1\nc.mp4 {label}\n")
    with pytest.raises(ValueError, match=rf"list.csv, line 3: label {label} .*\[0, 2\)"):
        VideoList(str(tmp_path / "list.csv"), num_classes=2)
    assert len(VideoList(str(tmp_path / "list.csv"), num_classes=100 if label > 0 else None)) == 3


@pytest.mark.parametrize("text", ["", "\n \n\n"])
def test_an_empty_list(tmp_path, text):
    (tmp_path / "none.csv").write_text(text)
    with pytest.raises(ValueError, match="none.csv: the list is empty"):
        VideoList(str(tmp_path / "none.csv"))


def test_a_missing_list(tmp_path):
    for path in (tmp_path / "nowhere.csv", tmp_path):
        with pytest.raises(ValueError, match=f"{path}: no such list file"):
            VideoList(str(path))


def test_missing_files_are_told_before_anything_is_computed(clips, tmp_path):
    """A look at some files, evenly over the list; the first one missing is named with its line."""
    there, gone = clips["bikes.mp4"], tmp_path / "gone.mp4"
    path = write_list(tmp_path / "list.csv", [there] * 19 + [gone])
    VideoList(path).check_files(0.05)
    with pytest.raises(ValueError, match=f"list.csv, line 20: no such file: {gone} .*--max_bad_fraction 0.04"):
        VideoList(path).check_files(0.04)
    (tmp_path / "list.csv").write_text(f"\n{there} 0\n\n{gone} 0\n{gone} 0\n")
    with pytest.raises(ValueError, match="line 4: no such file.*--data_root"):
        VideoList(path).check_files(0.6)
    many = VideoList(write_list(tmp_path / "long.csv", [there] * 2000 + [gone] * 8000))
    with pytest.raises(ValueError, match="160 of 200 looked for are missing"):
        many.check_files(0.79)


# Decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bikes.mp4", "with two spaces.mp4", "upright.mp4", "short.mp4"])
def test_frames_are_those_that_pyav_decodes(clips, name):
    all_frames = decode_all(clips[name])
    total = len(all_frames)
    rng = np.random.default_rng(0)
    some = np.sort(rng.integers(0, total, 8))
    for wanted in (np.arange(total), some, np.full(3, total - 1), np.array([0, 0, 2, 2, 4])):
        counts = []
        frames = read_frames(str(clips[name]), lambda count: counts.append(count) or wanted)
        assert counts == [total] and frames.dtype == np.uint8 and frames.shape == all_frames[wanted].shape
        error = np.abs(frames.astype(int) - all_frames[wanted])  # colour conversions may round differently
        assert error.mean() < 1.5 and error.max() < 12
    assert np.abs(np.diff(all_frames[[0, total - 1]].astype(int), axis=0)).mean() > 3  # frames do differ


def test_a_video_that_cannot_be_read(broken):
    for name, path in broken.items():
        with pytest.raises(VideoError) as error:
            read_frames(str(path), lambda total: np.arange(0, total, 3))
        assert str(error.value) and "\n" not in str(error.value), name


def test_the_reason_of_a_bad_video_is_the_same_every_time(broken):
    """It is what bad_clips.txt says of it: a time or an address in it would give the file many lines for one video."""
    for name, path in broken.items():
        reasons = set()
        for pause in (0, 1.1):
            time.sleep(pause if name == "cut" else 0)
            with pytest.raises(VideoError) as error:
                read_frames(str(path), lambda total: np.arange(0, total, 3))
            reasons.add(str(error.value))
        assert len(reasons) == 1, name


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


def make_dataset(list_path, objects=None, **options):
    """Clips of 4 frames, 64 px; with `objects` as in stage 1, else as in stage 2."""
    overlay, mask = None, "tube"
    if objects:
        overlay, mask = ObjectOverlay((SIDE, SIDE), ObjectLibrary(str(objects), find_objects(str(objects)))), "tubelet"
    return PretrainDataset(VideoList(list_path), MaskGenerator(mask, GRID, 0.75), overlay, (SIDE, SIDE), FRAMES, 2,
                           **options)


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
    masks = torch.cat([batch["extra"] for batch in batches])
    assert len(clips) == len(masks) == len(keys)
    return dict(zip(keys, zip(clips, masks)))


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(a, b) for key in one for a, b in zip(one[key], other[key]))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_samples_do_not_depend_on_workers_or_processes(mixed_list, objects_folder):
    dataset = make_dataset(mixed_list, objects_folder, seed=3)
    alone = load_epoch(dataset, 5)
    assert len(alone) == 12 and not same(alone, load_epoch(dataset, 6))
    for num_workers in (1, 3):
        assert same(alone, load_epoch(make_dataset(mixed_list, objects_folder, seed=3), 5, num_workers))
    halves = [load_epoch(make_dataset(mixed_list, objects_folder, seed=3), 5, workers, rank=rank, world=2)
              for rank, workers in enumerate((0, 3))]
    assert not halves[0].keys() & halves[1].keys() and same(alone, halves[0] | halves[1])


def test_a_sample_depends_on_seed_epoch_and_index(mixed_list, objects_folder):
    dataset = make_dataset(mixed_list, objects_folder, seed=3)
    first = dataset[5, 2]
    again = make_dataset(mixed_list, objects_folder, seed=3)[5, 2]
    assert np.array_equal(first["clips"], again["clips"]) and np.array_equal(first["extra"], again["extra"])
    others = [dataset[6, 2], make_dataset(mixed_list, objects_folder, seed=4)[5, 2]]
    assert all(not np.array_equal(first["clips"], other["clips"]) for other in others)
    draws = {sample_rng(*key).integers(1 << 60) for key in [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1)]}
    assert len(draws) == 4


def test_a_batch_is_uint8_with_exact_masks(mixed_list):
    dataset = make_dataset(mixed_list)
    loader = build_loader(dataset, ChunkSampler(len(dataset), 3), 1, False, 60)
    batch = next(iter(epoch_batches(loader, dataset.videos)))
    assert batch["clips"].dtype == torch.uint8 and batch["clips"].shape == (3, 3, FRAMES, SIDE, SIDE)
    assert batch["extra"].dtype == torch.bool and batch["extra"].shape == (3, np.prod(GRID))
    assert (batch["extra"].sum(dim=1) == num_masked(GRID, 0.75)).all() and len(batch["paths"]) == 3


def test_views_of_a_video_differ_and_lie_side_by_side(clips, objects_folder, tmp_path):
    path = write_list(tmp_path / "list.csv", [clips["bikes.mp4"], clips["bunny.mp4"]])
    dataset = make_dataset(path, objects_folder, num_views=3)
    loader = build_loader(dataset, ChunkSampler(2, 2), 0, False, 0)
    batch = next(iter(epoch_batches(loader, dataset.videos)))
    assert batch["clips"].shape == (6, 3, FRAMES, SIDE, SIDE) and batch["extra"].shape == (6, 32)
    assert len(batch["paths"]) == 2 and (batch["extra"].sum(dim=1) == num_masked(GRID, 0.75)).all()
    samples = [dataset[0, index] for index in (0, 1)]
    stacked = {sample["path"]: torch.from_numpy(sample["clips"]).permute(0, 4, 1, 2, 3) for sample in samples}
    assert torch.equal(batch["clips"], torch.cat([stacked[path] for path in batch["paths"]]))
    for views, masks in zip(batch["clips"].split(3), batch["extra"].split(3)):
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert not torch.equal(views[a], views[b]) and not torch.equal(masks[a], masks[b])


def test_the_overlay_does_not_leak_into_other_views(clips, objects_folder, tmp_path):
    """An overlay writes in place: each view must have its own pixels, and the same crop without objects differs."""
    dataset = make_dataset(write_list(tmp_path / "list.csv", [clips["bikes.mp4"]]), objects_folder)
    frames = np.full((FRAMES, SIDE, SIDE, 3), 17, np.uint8)
    clip, _ = dataset.view(np.random.default_rng(0), frames)
    assert (frames == 17).all() and (clip != 17).any()


# Bad files ------------------------------------------------------------------------------------------------------


def test_an_unreadable_video_is_replaced_and_reported(mixed_list, broken):
    for epoch in range(4):
        one, two = (make_dataset(mixed_list)[epoch, 3] for _ in range(2))
        assert np.array_equal(one["clips"], two["clips"]) and one["path"] == two["path"] != str(broken["text"])
        assert one["bad"][0][0] == str(broken["text"]) and one["num_bad_videos"] == len(one["bad"]) >= 1
    good = make_dataset(mixed_list)[0, 0]
    assert good["bad"] == [] and good["num_bad_videos"] == 0


def test_too_many_unreadable_videos_in_a_row_stop_the_run(broken, tmp_path):
    dataset = make_dataset(write_list(tmp_path / "bad.csv", [broken["missing"]] * 30))
    for num_workers in (0, 1):
        loader = build_loader(dataset, ChunkSampler(30, 2), num_workers, False, 60)
        with pytest.raises(RunError, match=rf"bad.csv: {MAX_BAD_IN_A_ROW} videos in a row.*missing.mp4") as error:
            list(epoch_batches(loader, dataset.videos))
        assert MAX_BAD_IN_A_ROW == 20 and "\n" not in str(error.value)


def test_a_skipped_object_is_noted_but_is_no_bad_video(clips, objects_folder, tmp_path):
    dataset = make_dataset(write_list(tmp_path / "list.csv", [clips["bikes.mp4"]] * 40), objects_folder)
    loader = build_loader(dataset, ChunkSampler(40, 2), 0, False, 0)
    bad, shown = BadFiles(str(tmp_path), 0.05), {}
    batches = list(bad.watch(epoch_batches(loader, dataset.videos), shown))
    assert len(batches) == 20 and (bad.bad, bad.videos) == (0, 40) and "bad_clips" not in shown
    lines = (tmp_path / "bad_clips.txt").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{objects_folder / 'bar' / 'broken.png'}\t")


def test_objects_that_cannot_be_used_are_not_blamed_on_the_video(clips, tmp_path):
    (tmp_path / "objects" / "junk").mkdir(parents=True)
    (tmp_path / "objects" / "junk" / "0.png").write_bytes(b"no image")
    dataset = make_dataset(write_list(tmp_path / "list.csv", [clips["bikes.mp4"]] * 4), tmp_path / "objects")
    for num_workers in (0, 1):
        loader = build_loader(dataset, ChunkSampler(4, 2), num_workers, False, 60)
        with pytest.raises(RunError, match="objects") as error:
            list(epoch_batches(loader, dataset.videos))
        assert "bikes.mp4" not in str(error.value) and "--worker_timeout" not in str(error.value)


def batch_of(paths, bad):
    return {"paths": paths, "bad": bad, "num_bad_videos": len(bad)}


def test_too_large_a_part_of_unreadable_videos_stops_the_run():
    shown, bad = {}, BadFiles("", 0.05)
    few = [batch_of(["x"] * 19, [(f"bad{i}", "text")]) for i in range(10)]  # 10 of 200
    assert len(list(bad.watch(few, shown))) == 10 and shown["bad_clips"] == 10
    with pytest.raises(RunError, match=r"--max_bad_fraction 0.05; the first: a: text; b: text; c: text$"):
        list(BadFiles("", 0.05).watch([batch_of(["x"] * 92, [(name, "text") for name in "abcdefgh"])], {}))


def test_a_few_first_bad_videos_do_not_stop_the_run():
    early = [batch_of(["x"] * 2, [("a", "text"), ("b", "text")])] + [batch_of(["x"] * 8, [])] * 10
    assert len(list(BadFiles("", 0.05).watch(early, {}))) == 11


def note_all(folder, reason):
    bad = BadFiles(folder, 1.0)
    for _ in range(3):
        list(bad.watch([batch_of(["x"], [(f"/videos/{i}.mp4", reason)]) for i in range(60)], {}))


@pytest.mark.parametrize("reasons", [("moov atom not found",) * 2, ("[10:00:01] failed", "[10:00:02] failed")])
def test_two_processes_note_a_bad_video_once(tmp_path, reasons):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=note_all, args=(str(tmp_path), reason)) for reason in reasons]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    note_all(str(tmp_path), reasons[0])  # and after a restart
    lines = (tmp_path / "bad_clips.txt").read_text().splitlines()
    assert sorted(line.split("\t")[0] for line in lines) == sorted(f"/videos/{i}.mp4" for i in range(60))
    assert {line.split("\t")[1] for line in lines} <= set(reasons)


# Order ----------------------------------------------------------------------------------------------------------


def keys_by_step(num_samples, chunk, update_freq, rank=0, world=1, epoch=0, seed=0):
    """For every optimizer step, its micro-batches of this process."""
    sampler = ChunkSampler(num_samples, chunk, update_freq, rank, world, seed)
    sampler.set_position(epoch)
    micro_batches = list(sampler)
    assert len(micro_batches) == len(sampler) == sampler.steps_per_epoch * update_freq
    return [micro_batches[i : i + update_freq] for i in range(0, len(micro_batches), update_freq)]


@pytest.mark.parametrize("num_samples, chunk, update_freq, world", [(50, 3, 2, 2), (64, 2, 1, 4), (101, 4, 3, 2)])
def test_processes_share_each_step_of_one_that_accumulates(num_samples, chunk, update_freq, world):
    alone = keys_by_step(num_samples, chunk, update_freq * world, epoch=4)
    ranks = [keys_by_step(num_samples, chunk, update_freq, rank, world, epoch=4) for rank in range(world)]
    assert len(alone) == num_samples // (chunk * update_freq * world)
    for step, *shares in zip(alone, *ranks, strict=True):
        assert step == [share[micro_batch] for micro_batch in range(update_freq) for share in shares]


def test_an_epoch_takes_each_video_at_most_once_and_epochs_differ():
    orders = {}
    for epoch, seed in ((0, 0), (1, 0), (0, 1)):
        keys = [key for step in keys_by_step(103, 5, 2, epoch=epoch, seed=seed) for batch in step for key in batch]
        assert len(keys) == len(set(keys)) == 100 and {e for e, _ in keys} == {epoch}
        assert {index for _, index in keys} <= set(range(103))
        orders[epoch, seed] = [index for _, index in keys]
    assert len({tuple(order) for order in orders.values()}) == 3
    left_out = set(range(103)) - set(orders[0, 0])
    assert left_out != set(range(103)) - set(orders[1, 0])  # what is dropped changes with the epoch


def test_all_orders_are_equally_likely():
    firsts = Counter(keys_by_step(5, 1, 1, epoch=epoch)[0][0][0][1] for epoch in range(1000))
    assert len(firsts) == 5 and min(firsts.values()) > 150


@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2)])
def test_set_position_goes_on_exactly(rank, world):
    sampler = ChunkSampler(60, 3, 2, rank, world)
    sampler.set_position(3)
    whole = list(sampler)
    for step in range(sampler.steps_per_epoch + 1):
        sampler.set_position(3, step)
        assert list(sampler) == whole[2 * step :]
    sampler.set_position(4)
    assert list(sampler)[0][0][0] == 4 and len(list(sampler)) == len(whole)


def test_chunk_ids_are_the_same_for_any_division():
    alone = ChunkSampler(96, 2, 4, 0, 1)
    for rank in range(2):
        half = ChunkSampler(96, 2, 2, rank, 2)
        for step in range(alone.steps_per_epoch):
            assert [half.chunk_id(step, i) for i in range(2)] == [alone.chunk_id(step, 2 * i + rank) for i in range(2)]


def test_fewer_videos_than_a_step_takes():
    with pytest.raises(ValueError, match="15 videos are fewer than the 16"):
        ChunkSampler(15, 2, 4, 0, 2)
    assert ChunkSampler(16, 2, 4, 0, 2).steps_per_epoch == 1


def test_a_loader_goes_on_in_mid_epoch_and_through_epochs(mixed_list):
    """Workers persist: the second epoch of a loader is that of a fresh one."""
    dataset = make_dataset(mixed_list)
    sampler = ChunkSampler(len(dataset), 2, seed=7)
    loader = build_loader(dataset, sampler, 2, False, 60)
    seen = []
    for epoch, step in ((0, 4), (1, 0)):
        sampler.set_position(epoch, step)
        seen += [batch["clips"] for batch in epoch_batches(loader, dataset.videos)]
    fresh = [clip for epoch in (0, 1) for clip, _ in load_epoch(make_dataset(mixed_list), epoch).values()]
    assert torch.equal(torch.cat(seen), torch.stack(fresh[8:]))


# Workers that fail ----------------------------------------------------------------------------------------------


class Trap(Dataset):
    """A dataset in which some indices have side effects."""

    def __init__(self, dataset, actions):
        self.dataset, self.actions = dataset, actions

    def __getitem__(self, key):
        if key[1] in self.actions:
            self.actions[key[1]]()
        return self.dataset[key]


@pytest.fixture
def traps(clips, tmp_path):
    """Given {place in the order of an epoch: side effect}: videos in that order, and the batches of an epoch."""
    names = [tmp_path / f"video {i}.mp4" for i in range(12)]
    for name in names:
        name.symlink_to(clips["small.mp4"])

    def build(actions, num_workers, timeout):
        dataset, sampler = make_dataset(write_list(tmp_path / "list.csv", names)), ChunkSampler(12, 1)
        order = [index for [(_, index)] in sampler]
        trap = Trap(dataset, {order[place]: action for place, action in actions.items()})
        loader = build_loader(trap, sampler, num_workers, False, timeout)
        return [str(names[index]) for index in order], epoch_batches(loader, dataset.videos)

    return build


def kill_self():
    os.kill(os.getpid(), 9)


def test_a_worker_that_hangs_is_reported_with_its_video(traps):
    order, batches = traps({3: lambda: time.sleep(30)}, num_workers=2, timeout=2)
    _, error = in_child(lambda: [next(batches) for _ in order] and None)
    assert error.startswith("utils.RunError: ") and "timed out after 2 seconds" in error
    assert [path for path in order if path in error] == [order[3]]


def test_a_worker_that_hangs_does_not_outlive_the_run(traps):
    """Python ends a program by asking its workers to end, and waits for them; this one would not heed it."""
    _, batches = traps({2: lambda: time.sleep(300)}, num_workers=2, timeout=2)

    def run():
        torch.set_num_threads(1)
        run_main(list, batches)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(40)
    ended = process.exitcode
    process.kill()
    assert ended == 1


def raises(error):
    raise error


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "reset by peer"), RuntimeError("boom")])
def test_any_failure_of_a_loader_is_told_in_one_line(traps, error):
    """A connection that breaks, too, whose EOFError comes without a word."""
    order, batches = traps({0: lambda: raises(error)}, num_workers=0, timeout=0)
    with pytest.raises(RunError, match="data loader failed") as told:
        next(batches)
    assert order[0] in str(told.value) and (str(error) or "EOFError") in str(told.value)
    assert "\n" not in str(told.value)


def test_a_worker_that_dies_is_reported_with_its_video(traps):
    order, batches = traps({1: kill_self, 0: lambda: time.sleep(2)}, num_workers=2, timeout=20)
    _, error = in_child(lambda: next(batches) and None)
    assert error.startswith("utils.RunError: the data loader failed")
    assert order[1] in error  # not only the one that was waited for


def test_a_worker_that_dies_after_some_batches_is_reported(traps):
    """It may take batches with it that were on their way, which breaks their connection. Torch's own error comes out
    of a signal handler, and so possibly while that one is being told.
    """
    for _ in range(4):
        order, batches = traps({4: kill_self}, num_workers=1, timeout=20)
        _, error = in_child(lambda: [next(batches) for _ in order] and None)
        assert error.startswith("utils.RunError: the data loader failed")
