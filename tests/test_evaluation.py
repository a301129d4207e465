"""Metrics of videos by counting, the files a test writes, and gathering over processes."""

import csv
import multiprocessing

import numpy as np
import pytest
import torch.distributed as dist
from fixtures_video import video_list

from evaluation import compute_metrics, gather_scores
from metrics import Task, VideoScore, accuracy, combine_views, in_top_k


def make_list(folder, labels, names=None):
    names = names or [f"{chr(97 + i % 26)}/video {i}.mp4" for i in range(len(labels))]
    (folder / "test.csv").write_text("".join(f"{name} {label}\n" for name, label in zip(names, labels)))
    return video_list(str(folder / "test.csv"), data_root="/videos")


def accuracy_by_hand(scores, labels):
    """By sorting, one video and one class at a time; of equal scores the first class counts as higher."""
    found = {}
    for k in (1, 5):
        right = [
            not np.isnan(row).any() and label in sorted(range(len(row)), key=lambda c: -row[c])[:k]
            for row, label in zip(scores, labels)
        ]
        classes = [[r for r, label in zip(right, labels) if label == c] for c in sorted(set(labels))]
        found[f"acc{k}"] = 100 * sum(right) / len(right)
        found[f"class_acc{k}"] = 100 * sum(sum(part) / len(part) for part in classes) / len(classes)
    return found


def random_scores(num_videos=200, num_classes=12, seed=0):
    """Logits of which about half are right, and uneven labels."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.geometric(0.25, num_videos) - 1, num_classes - 1)
    scores = rng.normal(size=(num_videos, num_classes))
    scores[np.arange(num_videos), labels] += 1.5
    return scores, labels


# Metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [3, 5, 12, 100])
def test_accuracy_equals_counting(num_classes):
    scores, labels = random_scores(num_classes=num_classes)
    ours = accuracy(scores, labels)
    assert ours == pytest.approx(accuracy_by_hand(scores, labels.tolist()))
    assert 10 < ours["acc1"] < 95 and ours["acc1"] != ours["class_acc1"]
    ties = np.random.default_rng(0).integers(0, 4, scores.shape).astype(float)
    assert accuracy(ties, labels) == pytest.approx(accuracy_by_hand(ties, labels.tolist()))


def test_unreadable_videos_are_wrong():
    scores, labels = random_scores(50)
    clean = accuracy(scores, labels)
    right = np.flatnonzero(in_top_k(scores, labels, 1))[:5]
    scores[right] = np.nan
    assert not in_top_k(scores, labels, 5)[right].any()
    assert accuracy(scores, labels) == pytest.approx(accuracy_by_hand(scores, labels.tolist()))
    assert accuracy(scores, labels)["acc1"] == pytest.approx(clean["acc1"] - 10)


def test_views_are_averaged():
    """And of several probes one is taken."""
    views, bad = np.random.default_rng(0).random((3, 4, 6)).astype(np.float32), VideoScore(3, np.empty(0), "bad")
    one = VideoScore(7, views).of_probe(1)
    assert np.array_equal(one.views, views[:, 1]) and one.index == 7 and bad.of_probe(1) == bad
    scores = [VideoScore(i, v[: 4 - i]) for i, v in enumerate(views)] + [bad]
    mean = combine_views(scores, 6)
    assert mean.dtype == np.float64 and np.isnan(mean[3]).all()
    for i in range(3):
        np.testing.assert_allclose(mean[i], sum(views[i][v].astype(float) for v in range(4 - i)) / (4 - i))


# A test's result ------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(tmp_path):
    """12 videos of 7 classes with 6 views each, two of them unreadable; their scores come in another order."""
    rng = np.random.default_rng(1)
    labels = [0, 1, 2, 6, 4, 5, 0, 1, 2, 6, 4, 0]
    views = rng.random((12, 6, 7)).astype(np.float32) + 0.4 * np.eye(7, dtype=np.float32)[labels][:, None]
    views /= views.sum(axis=2, keepdims=True)
    scores = [
        VideoScore(i, views[i]) if i not in (3, 7) else VideoScore(i, np.empty(0, np.float32), "moov atom")
        for i in rng.permutation(12).tolist()
    ]
    mean = views.astype(np.float64).mean(axis=1)
    mean[[3, 7]] = np.nan
    return scores, make_list(tmp_path, labels), labels, views, mean


def test_metrics_and_counts_are_given_and_predictions_written(judged, tmp_path):
    scores, videos, labels, views, mean = judged
    metrics = compute_metrics(scores, videos, Task(num_classes=7), str(tmp_path))
    assert (metrics.pop("videos"), metrics.pop("views"), metrics.pop("unreadable")) == (12, 60, 2)
    assert metrics == pytest.approx(accuracy_by_hand(mean, labels))
    with np.load(tmp_path / "test_predictions.npz", allow_pickle=False) as file:
        assert sorted(file) == ["label", "scores", "video", "view_scores"]
        assert file["video"].tolist() == [videos.path(i) for i in range(12)]  # in the order of the list
        assert file["label"].tolist() == labels
        np.testing.assert_allclose(file["scores"], mean, rtol=1e-6)  # NaN where unreadable
        assert file["view_scores"].shape == (12, 6, 7) and np.isnan(file["view_scores"][[3, 7]]).all()
        good = [i for i in range(12) if i not in (3, 7)]
        assert np.array_equal(file["view_scores"][good], views[good])


@pytest.mark.parametrize("names", [None, [f"class {c}, so called" for c in range(7)]])
def test_a_table_by_class_is_written(judged, tmp_path, names):
    scores, videos, labels, _, mean = judged
    compute_metrics(scores, videos, Task(num_classes=7, names=names), str(tmp_path))
    with open(tmp_path / "test_per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["0", "1", "2", "4", "5", "6"]
    for row in rows:
        label = int(row["class"])
        of_class = [i for i in range(12) if labels[i] == label]
        by_hand = accuracy_by_hand(mean[of_class], [label] * len(of_class))
        assert row["videos"] == str(len(of_class)) and row["name"] == (names[label] if names else "")
        assert row["top1"] == f"{by_hand['acc1']:.2f}" and row["top5"] == f"{by_hand['acc5']:.2f}"


def test_videos_of_the_same_name_in_two_folders_are_two(tmp_path):
    videos = make_list(tmp_path, [0, 1, 1], ["a/1.mp4", "b/1.mp4", "a/1.mp4"])  # and one is listed twice
    views = np.eye(2, dtype=np.float32)
    scores = [VideoScore(i, views[[label]]) for i, label in enumerate([0, 1, 0])]
    metrics = compute_metrics(scores, videos, Task(num_classes=2), str(tmp_path))
    assert metrics["videos"] == 3 and metrics["acc1"] == pytest.approx(200 / 3)
    with np.load(tmp_path / "test_predictions.npz") as file:
        assert file["video"].tolist() == ["/videos/a/1.mp4", "/videos/b/1.mp4", "/videos/a/1.mp4"]


def test_a_list_of_which_nothing_can_be_read(tmp_path):
    videos = make_list(tmp_path, [0, 1])
    scores = [VideoScore(i, np.empty(0, np.float32), "no such file") for i in range(2)]
    metrics = compute_metrics(scores, videos, Task(num_classes=6), str(tmp_path))
    assert metrics == {"acc1": 0, "class_acc1": 0, "acc5": 0, "class_acc5": 0, "videos": 2, "views": 0, "unreadable": 2}


# Processes ------------------------------------------------------------------------------------------------------


def judge_share(rank, world, folder, scores, videos, pipe):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    everywhere = [score.index for score in gather_scores(scores[rank::world], everywhere=True)]
    first = [score.index for score in gather_scores(scores[rank::world])]
    (folder / str(rank)).mkdir()
    pipe.send(
        (compute_metrics(scores[rank::world], videos, Task(num_classes=7), str(folder / str(rank))), everywhere, first)
    )
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_together_find_what_one_finds(judged, tmp_path, world):
    """12 videos; world 5 does not divide them."""
    scores, videos, *_ = judged
    alone = compute_metrics(scores, videos, Task(num_classes=7))
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(world)]
    processes = [
        fork.Process(target=judge_share, args=(rank, world, tmp_path, scores, videos, pipes[rank][1]))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for rank, (ours, _) in enumerate(pipes):
        assert ours.poll(300), f"process {rank} does not answer"
        metrics, everywhere, first = ours.recv()
        assert metrics == alone  # to the last digit
        assert everywhere == list(range(12)) and first == (list(range(12)) if rank == 0 else [])
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    assert [bool(list((tmp_path / str(rank)).iterdir())) for rank in range(world)] == [True] + [False] * (world - 1)
