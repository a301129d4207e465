"""Which frames, the views of tests against PyAV and torchvision, labelled samples, and files that are not there."""

import functools
from collections import Counter
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from fixtures_video import decode_all, source_frames, video_list, write_list, write_mp4
from torchvision.transforms.functional import resize

import video_reader
from datasets import ChunkSampler, build_loader
from datasets_finetune import DataSet, EvalDataset, FinetuneDataset, ViewReader, dense_indices, segment_indices
from datasets_finetune import test_view_indices as view_indices
from metrics import Task
from training import epoch_batches
from video_reader import VideoError
from video_transforms_finetune import TrainAugmentation

pytest_plugins = "fixtures_video"
SAMPLING = [(16, 4), (16, 2), (8, 8), (4, 1), (32, 3)]  # frames, stride


# Which frames ---------------------------------------------------------------------------------------------------


def dense_by_hand(total, frames, stride, start=None):
    """the recipe, in exact numbers; `start` of the window."""
    window = frames * stride
    if total <= window:
        number = total // stride
        spread = [Fraction(k * total, max(number - 1, 1)) for k in range(number)]
        return [min(int(place), total - 1) for place in spread] + [total - 1] * (frames - number)
    return [min(int(start + Fraction(k * window, frames - 1)), start + window - 1) for k in range(frames)]


@pytest.mark.parametrize("frames, stride", SAMPLING)
def test_dense_training_frames(frames, stride):
    window = frames * stride
    for total in [*range(1, window + 40), 300, 1000]:
        starts = set()
        for seed in range(3):
            indices = dense_indices(np.random.default_rng(seed), total, frames, stride).tolist()
            start = indices[0] if total > window else None
            assert indices == dense_by_hand(total, frames, stride, start)
            assert len(indices) == frames and min(indices) >= 0 and max(indices) < total and indices == sorted(indices)
            starts.add(start)
        assert total <= window + 20 or len(starts) > 1
        centre = dense_indices(None, total, frames, stride).tolist()
        assert centre == dense_by_hand(total, frames, stride, (total - window) // 2)


@pytest.mark.parametrize("frames", [16, 8, 1])
def test_segment_training_frames(frames):
    rng = np.random.default_rng(0)
    for total in range(1, 100):
        length = total // frames
        for _ in range(3):
            indices = segment_indices(rng, total, frames)
            if length:
                assert (indices // length == np.arange(frames)).all() and indices.max() < total
            else:  # spread evenly with repeats
                assert indices.tolist() == [k * total // frames for k in range(frames)]
                assert set(indices.tolist()) == set(range(total))
        middles = segment_indices(None, total, frames).tolist()
        if length:
            assert middles == [k * length + length // 2 for k in range(frames)]


def test_every_start_and_every_frame_of_a_segment_is_equally_likely():
    rng = np.random.default_rng(0)
    starts = Counter(int(dense_indices(rng, 74, 16, 4)[0]) for _ in range(2000))
    assert set(starts) == set(range(10)) and min(starts.values()) > 140 and max(starts.values()) < 260
    drawn = np.stack([segment_indices(rng, 83, 16) for _ in range(2000)])  # 16 segments of 5
    for number, column in enumerate(drawn.T):
        frames, counts = np.unique(column, return_counts=True)
        assert frames.tolist() == list(range(5 * number, 5 * number + 5)) and counts.min() > 300
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 0.1


def dense_views_by_hand(total, frames, stride, views):
    every = list(range(0, total, stride))
    while len(every) < frames:
        every.append(every[-1])
    found = []
    for k in range(views):
        start = int(k * max((len(every) - frames) / (views - 1), 0)) if views > 1 else (len(every) - frames) // 2
        found.append(every[start : start + frames])
    return found


@pytest.mark.parametrize("frames, stride", SAMPLING)
def test_dense_views(frames, stride):
    for views in (1, 2, 5, 7, 10):
        for total in [*range(1, frames * stride + 20), 250, 300, 1021]:
            found = view_indices(total, frames, stride, views, "dense").tolist()
            assert found == dense_views_by_hand(total, frames, stride, views)
    views = view_indices(300, 16, 4, 7, "dense")  # from the start of the video to its end
    assert views[0, 0] == 0 and views[-1, -1] == 296 and (np.diff(views, axis=1) == 4).all()


def segment_views_by_hand(total, frames):
    tick = total / frames
    both = sorted([int(tick / 2 + tick * i) for i in range(frames)] + [int(tick * i) for i in range(frames)])
    return [both[0::2], both[1::2]]


@pytest.mark.parametrize("frames", [16, 8])
def test_segment_views(frames):
    for total in [*range(1, 130), 300]:
        found = view_indices(total, frames, 2, 2, "segments").tolist()
        assert found == segment_views_by_hand(total, frames)
        assert max(found[1]) < total
        centre = view_indices(total, frames, 2, 1, "segments").tolist()
        assert centre == [[int(total / frames / 2 + total / frames * i) for i in range(frames)]]


# Views of real videos -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def long_clip(tmp_path_factory):
    """200 frames, 96 x 64."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    write_mp4(path, source_frames("bikes", 0, 200, (96, 64)))
    return path


@functools.cache
def frames_of(path):
    return decode_all(path)


def square(frames, size, crop, crops):
    """the recipe's spatial view by torchvision: uint8 [T, H, W, 3] → [T, size, size, 3]."""
    height, width = frames.shape[1:3]
    shape = [size, int(width * size / height)] if height <= width else [int(height * size / width), size]
    resized = resize(torch.from_numpy(frames).permute(0, 3, 1, 2), shape, antialias=True).permute(0, 2, 3, 1).numpy()
    spare = max(shape) - size
    offset = spare // 2 if crops == 1 else int(crop * spare / (crops - 1))
    cut = slice(offset, offset + size)
    return resized[:, cut] if height > width else resized[:, :, cut]


NAMES = ["long", "bikes.mp4", "upright.mp4", "small.mp4", "short.mp4"]  # the last two: 24 and 5 frames


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "views",
    "dense 7 3 4, dense 7 3 1, segments 2 3 2, dense 1 1 2, segments 1 3 2, dense 0 1 2, segments 0 1 2".split(", "),
)
def test_views_are_crops_of_the_frames_that_pyav_decodes(clips, long_clip, name, views):
    """`views`: sampling, segments, crops, stride."""
    sampling, (segments, crops, stride) = views.split()[0], map(int, views.split()[1:])
    path = long_clip if name == "long" else clips[name]
    total = len(frames_of(path))
    if segments == 0:  # validation
        middle = dense_by_hand(total, 16, stride, (total - 16 * stride) // 2)
        wanted = [middle if sampling == "dense" else segment_indices(None, total, 16).tolist()]
    elif sampling == "dense":
        wanted = dense_views_by_hand(total, 16, stride, segments)
    else:
        wanted = segment_views_by_hand(total, 16)[-segments:]
    expected = np.stack([square(frames_of(path)[part], 48, crop, crops) for part in wanted for crop in range(crops)])
    views = ViewReader(sampling, segments, crops, 48, 16, stride)(str(path)).numpy()
    assert views.dtype == np.uint8 and views.shape == (max(segments, 1) * crops, 3, 16, 48, 48)
    assert np.abs(views.transpose(0, 2, 3, 4, 1).astype(int) - expected).max() <= 1
    if crops == 3 and name != "short.mp4":  # which is square
        assert np.abs(views[0].astype(int) - views[2]).mean() > 3  # the comparison is worth something


def test_a_video_is_opened_and_decoded_once_for_all_its_views(clips, long_clip, tmp_path, monkeypatch):
    opened, converted = [], []
    open_file, to_rgb = av.open, video_reader.to_rgb
    monkeypatch.setattr(av, "open", lambda path, *args, **more: opened.append(path) or open_file(path, *args, **more))
    counted = lambda frame, *more: converted.append(frame.pts) or to_rgb(frame, *more)
    monkeypatch.setattr(video_reader, "to_rgb", counted)
    videos = video_list(write_list(tmp_path / "test.csv", [long_clip, clips["bikes.mp4"], clips["short.mp4"]], 0))
    for reader in (ViewReader("dense", 7, 3, 32, 16, 4), ViewReader("segments", 2, 3, 32, 16, 2)):
        dataset = EvalDataset(videos, range(3), reader, 16)
        for index in range(3):
            opened.clear(), converted.clear()
            parts = list(dataset.samples(index))
            assert [part["last"] for part in parts] == [False] * (len(parts) - 1) + [True]
            assert max(len(part["views"]) for part in parts) <= 16
            views = torch.cat([part["views"] for part in parts])
            assert len(views) == reader.segments * 3 and torch.equal(views, reader(videos.path(index)))
            assert opened == [videos.path(index)] * 2  # once for the parts, once for the comparison
            half = converted[: len(converted) // 2]
            assert len(set(half)) == len(half) and half * 2 == converted  # repeated frames are converted once


def test_an_unreadable_video_is_an_error_not_another_video(clips, broken, tmp_path):
    names = [clips["bikes.mp4"], broken["text"], broken["missing"], broken["sound only"]]
    videos = video_list(write_list(tmp_path / "test.csv", names, 0))
    dataset = EvalDataset(videos, range(4), ViewReader("dense", 2, 3, 32, 8, 2), 16)
    samples = list(dataset)
    assert [sample["index"] for sample in samples] == [0, 1, 2, 3]
    assert samples[0]["error"] == "" and len(samples[0]["views"]) == 6
    assert all(sample["error"] and len(sample["views"]) == 0 for sample in samples[1:])
    with pytest.raises(VideoError, match="no such file"):
        dataset.read_views(str(broken["missing"]))


def frames_that_decode(path):
    """What FFmpeg shows of a damaged file: packets that do not decode are dropped."""
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            try:
                yield from (frame.to_ndarray(format="rgb24") for frame in packet.decode())
            except av.error.InvalidDataError:
                continue


@pytest.mark.parametrize("views", [(2, 3), (5, 1)])
def test_a_video_with_a_damaged_end_is_tested_on_the_frames_that_are_left(tmp_path, views):
    """FFmpeg drops the last frames, which the packets still announce."""
    path, (segments, crops) = tmp_path / "damaged.mp4", views
    write_mp4(path, source_frames("bikes", 0, 120, (96, 64)))
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    with open(path, "r+b") as file:
        for place, size in packets[-10:]:
            file.seek(place)
            file.write(bytes(size))
    frames = np.stack(list(frames_that_decode(path)))
    assert 100 < len(frames) < 120
    wanted = dense_views_by_hand(len(frames), 16, 4, segments)
    expected = np.stack([square(frames[part], 48, crop, crops) for part in wanted for crop in range(crops)])
    [sample] = EvalDataset(
        video_list(write_list(tmp_path / "l.csv", [path], 0)), [0], ViewReader("dense", *views, 48, 16, 4), 16
    )
    assert sample["error"] == ""
    assert np.abs(sample["views"].numpy().transpose(0, 2, 3, 4, 1).astype(int) - expected).max() <= 1


# Labelled samples -----------------------------------------------------------------------------------------------


def make_dataset(path, flip=True, **options):
    """Clips of 4 frames, 32 px."""
    augment = TrainAugmentation(32, options.pop("policy", "rand-m7-n4-mstd0.5-inc1"), flip)
    sampling = options.pop("sampling", "dense")
    return FinetuneDataset(video_list(path, 5), Task().clip_label, augment, sampling, 4, 2, **options)


@pytest.fixture
def labelled_list(clips, tmp_path):
    """Five good videos with labels 0 to 4, and back."""
    names = [clips[name] for name in ("bikes.mp4", "bunny.mp4", "with two spaces.mp4", "upright.mp4", "small.mp4")]
    lines = [f"{name} {label}" for label, name in [*enumerate(names), *reversed(list(enumerate(names)))]]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    return str(tmp_path / "train.csv")


def test_a_sample_depends_on_seed_epoch_and_index_only(labelled_list):
    first, again = (make_dataset(labelled_list, seed=3)[5, 2] for _ in range(2))
    assert np.array_equal(first["clips"], again["clips"]) and np.array_equal(first["erase"], again["erase"])
    assert first["clips"].shape == (1, 4, 32, 32, 3) and first["labels"].tolist() == [2]
    for other in (make_dataset(labelled_list, seed=3)[6, 2], make_dataset(labelled_list, seed=4)[5, 2]):
        assert not np.array_equal(first["clips"], other["clips"]) and first["erase"] != other["erase"]


@pytest.mark.parametrize("sampling", ["dense", "segments"])
def test_repeated_augmentation_decodes_once_and_augments_each_time(labelled_list, sampling):
    dataset = make_dataset(labelled_list, num_views=3, sampling=sampling)
    sample = dataset[0, 4]
    assert sample["clips"].shape == (3, 4, 32, 32, 3) and sample["labels"].tolist() == [4] * 3
    assert len(set(sample["erase"].tolist())) == 3
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert not np.array_equal(sample["clips"][a], sample["clips"][b])
    assert np.array_equal(make_dataset(labelled_list, sampling=sampling)[0, 4]["clips"][0], sample["clips"][0])


def test_repeated_augmentation_takes_the_same_frames(tmp_path):
    """Each frame has a colour of its own, which crops and flips leave alone."""
    shades = np.arange(60) * 4
    write_mp4(tmp_path / "shades.mp4", np.broadcast_to(shades[:, None, None, None], (60, 64, 64, 3)).astype(np.uint8))
    dataset = make_dataset(write_list(tmp_path / "list.csv", [tmp_path / "shades.mp4"], 1), policy="", num_views=3)
    taken = set()
    for epoch in range(4):
        means = dataset[epoch, 0]["clips"].mean(axis=(2, 3, 4))  # [views, T]
        assert np.ptp(means, axis=0).max() < 1 and np.diff(means, axis=1).min() > 3
        taken.add(round(float(means[0, 0])))
    assert len(taken) > 1


def test_a_batch_has_labels_and_is_the_same_with_workers(labelled_list):
    batches = []
    for num_workers in (0, 2):
        dataset = make_dataset(labelled_list, num_views=2, seed=1)
        loader = build_loader(dataset, ChunkSampler(10, 5, seed=1), num_workers, False, 60)
        batches.append(list(epoch_batches(loader, dataset.videos)))
    videos = video_list(labelled_list)
    label_of = {videos.path(i): videos.labels[i] for i in range(len(videos))}
    for one, other in zip(*batches, strict=True):
        assert one["clips"].dtype == torch.uint8 and one["clips"].shape == (10, 3, 4, 32, 32)
        assert one["labels"].dtype == torch.int64 and one["erase"].shape == (10,)
        assert one["labels"].tolist() == [label_of[path] for path in one["paths"] for _ in range(2)]
        assert all(torch.equal(one[name], other[name]) for name in ("clips", "labels", "erase"))


def test_a_replaced_video_brings_its_own_label(labelled_list, broken, tmp_path):
    text = (tmp_path / "train.csv").read_text()
    (tmp_path / "with bad.csv").write_text(f"{broken['text']} 0\n{text}")
    dataset = make_dataset(str(tmp_path / "with bad.csv"))
    videos, seen = dataset.videos, set()
    for epoch in range(12):
        sample = dataset[epoch, 0]
        assert sample["bad"][0][0] == str(broken["text"]) and sample["num_bad_videos"] == len(sample["bad"])
        [label] = sample["labels"].tolist()
        assert sample["path"] in [videos.path(i) for i in range(1, 11) if videos.labels[i] == label]
        seen.add(label)
    assert len(seen) > 2


def test_a_data_set_has_a_sampling_that_is_known():
    """Views of a test are dense unless told otherwise, so a misspelt sampling would go unnoticed there."""
    with pytest.raises(ValueError, match=r"sampling 'segment': choose from \('dense', 'segments'\)"):
        DataSet(3, "segment", True, 5, 3)
