"""Bad files, the order of samples for any division among processes, and workers that fail."""

import multiprocessing
import os
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from fixtures_datasets import load_epoch, make_dataset
from fixtures_video import in_child, write_list
from torch.utils.data import Dataset

from datasets import MAX_BAD_IN_A_ROW, ChunkSampler, build_loader
from meters import BadFiles
from training import epoch_batches
from utils import RunError, run_main

pytest_plugins = "fixtures_datasets"


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
        with pytest.raises(RunError, match="^--objects_path .*: 100 unusable images") as error:
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
    early = [batch_of(["x"] * 2, [("a", "text"), ("b", "text")])] + [batch_of(["x"] * 8, [])] * 10
    assert len(list(BadFiles("", 0.05).watch(early, {}))) == 11  # the first few do not stop it


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
    assert next(iter(sampler))[0][0] == 4 and len(list(sampler)) == len(whole)


def test_chunk_ids_are_the_same_for_any_division():
    with pytest.raises(ValueError, match="15 videos are fewer than the 16"):
        ChunkSampler(15, 2, 4, 0, 2)
    assert ChunkSampler(16, 2, 4, 0, 2).steps_per_epoch == 1
    alone = ChunkSampler(96, 2, 4, 0, 1)
    for rank in range(2):
        half = ChunkSampler(96, 2, 2, rank, 2)
        for step in range(alone.steps_per_epoch):
            assert [half.chunk_id(step, i) for i in range(2)] == [alone.chunk_id(step, 2 * i + rank) for i in range(2)]


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


def test_a_worker_that_hangs_is_reported_with_its_video_and_does_not_outlive_the_run(traps, tmp_path):
    """Python ends a program by asking its workers to end, and waits for them; this one would not heed it."""
    order, batches = traps({3: lambda: time.sleep(300)}, num_workers=2, timeout=4)

    def run():
        torch.set_num_threads(1)
        with open(tmp_path / "err", "w") as sys.stderr:
            run_main(list, batches)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(200)
    ended, error = process.exitcode, (tmp_path / "err").read_text()
    process.kill()
    assert ended == 1 and error.startswith("error: ") and "timed out after 4 seconds" in error
    assert [path for path in order if path in error] == [order[3]]


def raises(error):
    raise error


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "reset by peer"), RuntimeError("boom")])
def test_any_failure_of_a_loader_is_reported_in_one_line(traps, error):
    """A connection that breaks, too, whose EOFError comes without a word."""
    order, batches = traps({0: lambda: raises(error)}, num_workers=0, timeout=0)
    with pytest.raises(RunError, match="data loader failed") as told:
        next(batches)
    assert order[0] in str(told.value) and (str(error) or "EOFError") in str(told.value)
    assert "\n" not in str(told.value)


def test_a_worker_that_dies_is_reported_with_its_video(traps):
    order, batches = traps({1: kill_self, 0: lambda: time.sleep(2)}, num_workers=2, timeout=60)
    _, error = in_child(lambda: [next(batches) for _ in order] and None)
    assert error.startswith("utils.RunError: the data loader failed")
    assert order[1] in error  # not only the one that was waited for


def test_a_worker_that_dies_after_some_batches_is_reported(traps):
    """It may take batches with it that were on their way, which breaks their connection. Torch's own error comes out
    of a signal handler, and so possibly while that one is being told; a Run puts that right.
    """
    for _ in range(4):
        order, batches = traps({4: kill_self}, num_workers=1, timeout=60)
        _, error = in_child(lambda: [next(batches) for _ in order] and None)
        assert error.startswith(("utils.RunError: the data loader failed", "RuntimeError: DataLoader worker"))
