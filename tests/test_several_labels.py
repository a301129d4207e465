"""Videos with several labels (Charades): lists with seconds, labels of clips, average precision against scikit-learn's,
and the program: fine-tuning, probes, neighbours and the test, in one process and in two.
"""

import csv
import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fixtures_finetuning import PLAIN, TINY, log_of
from fixtures_video import source_frames, video_list, write_lines, write_mp4
from sklearn.metrics import average_precision_score

from datasets_finetune import FinetuneDataset, dense_indices
from evaluation import compute_metrics
from lists import read_list
from metrics import MultiLabelTask, VideoScore, average_precision, read_actions
from modeling_finetune import MODELS
from modeling_probe import ProbeLoss, nearest_neighbours
from options_finetune import find_problems, get_args, read_data_list, task
from run_class_finetuning import build_loss, build_train_set
from video_transforms_finetune import TrainAugmentation

pytest_plugins = "fixtures_finetuning"
LINES = ["rel/46GP8.mp4 92:11.90-21.20,147:0.00-12.60", "/a/two spaces.mp4 -", "N11GT.mp4 3:4-9.5,3:2.0-6,0:0.00-1"]


# Lists ----------------------------------------------------------------------------------------------------------


def multi_hot(*classes, num_classes=157):
    return [float(c in classes) for c in range(num_classes)]


def action_list(path, num_classes, data_root=""):
    """A list whose labels have seconds, and its task."""
    task = MultiLabelTask("max", num_classes, needs_seconds=True)
    return read_list(path, task.parse_label, data_root), task


def test_a_list_with_actions(tmp_path):
    videos, task = action_list(write_lines(tmp_path / "list.csv", LINES), 157, "/data")
    assert [videos.path(i) for i in range(3)] == ["/data/rel/46GP8.mp4", "/a/two spaces.mp4", "/data/N11GT.mp4"]
    assert task.targets(videos.labels).tolist() == [multi_hot(92, 147), multi_hot(), multi_hot(0, 3)]
    assert task.targets(videos.labels).dtype == np.float32
    part = videos.subset(np.array([2, 0]))
    assert task.targets(part.labels).tolist() == [multi_hot(0, 3), multi_hot(92, 147)]
    assert label_between(part, task, 0, 7, 8).tolist() == multi_hot(3)
    part.write(str(tmp_path / "part.csv"))
    again, _ = action_list(str(tmp_path / "part.csv"), 157)
    assert again.labels.tolist() == part.labels.tolist()


def label_between(videos, task, index, start, end):
    return task.seen(read_actions(videos.labels[index].decode()), start, end)


@pytest.mark.parametrize("label", ["", " 92", " 92:1.0", " 92:1-2,", " c092 11.90 21.20", " --"])
def test_a_line_without_actions_is_named(tmp_path, label):
    with pytest.raises(ValueError, match=r"list.csv, line 2: .*(not `path label`|`92:11.90-21.20,147:0.00-12.60`)"):
        action_list(write_lines(tmp_path / "list.csv", [LINES[0], f"46GP8.mp4{label}"]), 157)


def test_a_wrong_class_and_a_wrong_order_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"list.csv, line 1: label 157 is not in \[0, 157\)"):
        action_list(write_lines(tmp_path / "list.csv", ["a.mp4 3:1-2,157:0-1"]), 157)
    with pytest.raises(ValueError, match=r"list.csv, line 1: 3:2-1.5 ends before it starts"):
        action_list(write_lines(tmp_path / "list.csv", ["a.mp4 3:2-1.5"]), 157)
    with pytest.raises(ValueError, match=r"line 1: label '92:.*' is not a whole number; videos with several"):
        video_list(write_lines(tmp_path / "list.csv", LINES), 157)


def test_the_label_of_a_part_is_the_union_of_what_is_seen_in_it(tmp_path):
    """Against each moment of it by itself."""
    rng = np.random.default_rng(0)
    spans = np.sort(rng.uniform(0, 30, (300, 2)).round(2), axis=1)
    actions = [f"{c}:{start}-{end}" for c, (start, end) in enumerate(spans)]
    videos, task = action_list(write_lines(tmp_path / "list.csv", [f"a.mp4 {','.join(actions)}"]), 300)
    for start in (0.0, 3.17, 12.0, 29.0):
        moments = np.arange(start, start + 5, 0.01).round(2)
        seen = ((spans[:, :1] <= moments) & (moments <= spans[:, 1:])).any(axis=1)
        assert (label_between(videos, task, 0, start, moments[-1]) == seen).all()


@pytest.mark.parametrize("rate, codec", [(25, "libx264"), (10, "libx264"), (12.5, "mpeg4")])
def test_clips_are_labelled_by_their_seconds(tmp_path, rate, codec):
    """A class for each frame, seen when that frame is shown: a clip has those from its first to its last frame."""
    frames, path = source_frames("bikes", 0, 40, (64, 48)), tmp_path / ("a.avi" if codec == "mpeg4" else "a.mp4")
    write_mp4(path, frames, rate=rate, codec=codec)
    actions = ",".join(f"{n}:{n / rate - 0.001:.4f}-{n / rate + 0.001:.4f}" for n in range(1, 40))
    videos, task = action_list(write_lines(tmp_path / "list.csv", [f"{path} {actions}"]), 40)
    dataset = FinetuneDataset(videos, task.clip_label, TrainAugmentation(32, "", False), "dense", 4, 3, num_views=2)
    firsts = Counter()
    for epoch in range(12):
        sample = dataset[epoch, 0]
        assert sample["labels"].shape == (2, 40) and (sample["labels"][0] == sample["labels"][1]).all()
        seen = np.flatnonzero(sample["labels"][0])
        indices = [dense_indices(np.random.default_rng((0, epoch, 0)), 40, 4, 3)[at] for at in (0, -1)]
        assert (seen == np.arange(max(1, indices[0]), indices[1] + 1)).all()
        firsts[int(seen[0])] += 1
    assert len(firsts) > 3


@pytest.mark.parametrize("labels", ["0,2", "2:0.1-0.9", "0:0.1-0.9,2"])
def test_the_form_of_custom_lists_decides(clips, tmp_path, labels):
    """Of any of them: with several labels all are read so, with seconds or without."""
    names = [clips["bikes.mp4"], clips["bunny.mp4"]]
    for name, texts in (("train.csv", ["1", labels]), ("val.csv", ["1", "0"]), ("test.csv", ["-1", "-1"])):
        write_lines(tmp_path / name, [f"{path} {text}" for path, text in zip(names, texts)])
    args = get_args(["--data_set", "custom", "--nb_classes", "3", "--data_path", str(tmp_path), *PLAIN])
    assert isinstance(task(args), MultiLabelTask) and find_problems(args).found == []
    assert args.several_labels == f"{tmp_path}/train.csv, line 2: {labels}"
    assert task(args).targets(read_data_list(args, "val.csv").labels).tolist() == [[0, 1, 0], [1, 0, 0]]
    sample = build_train_set(args)[0, 1]
    assert sample["labels"].tolist() == [[float(str(c) in re.split("[,:]", labels)) for c in range(3)]]
    norm = torch.zeros(3), torch.ones(3)
    assert isinstance(build_loss(args, norm, np.zeros(0, int))[0], torch.nn.BCEWithLogitsLoss)
    write_lines(tmp_path / "val.csv", [f"{names[0]} 0,3"])
    assert "val.csv, line 1: label 3 is not in [0, 3)" in find_problems(args).found[0]


# Average precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_average_precision_equals_that_of_scikit_learn(seed):
    """With ties, and with videos that could not be read, which come last."""
    rng = np.random.default_rng(seed)
    total = int(rng.integers(1, 200))
    scores = rng.random(total).round(int(rng.integers(1, 8)))
    positive = rng.random(total) < rng.random()
    positive[rng.integers(total)] = True
    assert average_precision(scores, positive) == pytest.approx(average_precision_score(positive, scores), abs=1e-12)
    lost = rng.random(total) < 0.2
    ours = average_precision(np.where(lost, np.nan, scores), positive)
    assert ours == pytest.approx(average_precision_score(positive, np.where(lost, -1, scores)), abs=1e-12)
    unread = average_precision(np.full(total, np.nan), positive)
    assert unread == pytest.approx(positive.mean())  # as of a constant answer


def per_class(folder):
    with open(folder / "test_per_class.csv", newline="") as file:
        return {int(row["class"]): row for row in csv.DictReader(file)}


@pytest.fixture
def judged(tmp_path):
    """30 videos with 4 views each, 3 of them unreadable, of 12 classes; two of these are never seen."""
    rng = np.random.default_rng(3)
    labels = (rng.random((30, 12)) < 0.3) & ~np.isin(np.arange(12), (4, 11))
    lines = [f"{i}.mp4 {','.join(f'{c}:0-1' for c in np.flatnonzero(row)) or '-'}" for i, row in enumerate(labels)]
    videos, _ = action_list(write_lines(tmp_path / "list.csv", lines), 12)
    views = rng.random((30, 4, 12)).astype(np.float32)
    scores = [VideoScore(i, view) for i, view in enumerate(views)]
    for i in (2, 9, 20):
        scores[i] = VideoScore(i, np.empty(0, np.float32), "broken")
    return videos, scores, labels, views


@pytest.mark.parametrize("combine", ["max", "mean"])
def test_the_mean_over_classes_equals_that_of_scikit_learn(judged, tmp_path, combine):
    videos, scores, labels, views = judged
    task = MultiLabelTask(combine, 12, [f"class {c}" for c in range(12)])
    metrics = compute_metrics(scores, videos, task, str(tmp_path))
    combined = getattr(views, combine)(axis=1)
    combined[[2, 9, 20]] = -1
    seen = [c for c in range(12) if labels[:, c].any()]
    by_class = average_precision_score(labels[:, seen], combined[:, seen], average=None)
    assert len(seen) == 10 and metrics["classes"] == 10
    assert metrics["map"] == pytest.approx(100 * by_class.mean(), abs=1e-6)
    assert (metrics["videos"], metrics["views"], metrics["unreadable"]) == (30, 108, 3)
    table = per_class(tmp_path)
    assert list(table) == seen and [row["name"] for row in table.values()] == [f"class {c}" for c in seen]
    assert [row["ap"] for row in table.values()] == [f"{100 * value:.2f}" for value in by_class]
    assert [int(row["videos"]) for row in table.values()] == labels[:, seen].sum(axis=0).tolist()
    with np.load(tmp_path / "test_predictions.npz") as file:
        assert (file["label"] == labels).all() and file["view_scores"].shape == (30, 4, 12)
        np.testing.assert_allclose(np.nan_to_num(file["scores"], nan=-1), combined, rtol=1e-6)


# Loss and neighbours --------------------------------------------------------------------------------------------


def test_the_loss_of_probes_is_the_sum_of_their_own_and_neighbours_vote_for_all_their_classes():
    logits, labels = torch.randn(6, 3, 5), (torch.rand(6, 5) < 0.4).float()
    expected = sum(F.binary_cross_entropy_with_logits(logits[:, p], labels) for p in range(3))
    torch.testing.assert_close(ProbeLoss(MultiLabelTask().losses)(logits, labels), expected)
    rng = np.random.default_rng(0)
    train, test, labels = rng.normal(size=(40, 6)), rng.normal(size=(5, 6)), (rng.random((40, 7)) < 0.3).astype(float)
    ours = nearest_neighbours(*map(torch.from_numpy, (train, labels, test)), 9, 7).numpy()
    for row, query in zip(ours, test, strict=True):
        cosine = train @ query / np.linalg.norm(train, axis=1) / np.linalg.norm(query)
        nearest = np.argsort(-cosine)[:9]
        weights = np.exp(cosine[nearest] / 0.07)
        np.testing.assert_allclose(row, weights @ labels[nearest] / weights.sum())


# The program ----------------------------------------------------------------------------------------------------

FEW = ["--test_num_segment", "2", "--test_num_crop", "1", "--sampling_rate", "1"]
TRAIN = [*TINY, *PLAIN, *FEW, "--batch_size", "2", "--lr", "0.1", "--layer_decay", "1", "--init_scale", "1"]


@pytest.fixture(scope="module")
def charades(broken, tmp_path_factory):
    """Six videos of 1 s each: class 5 is red, in the first half or the second, class 80 is blue, all the time."""
    folder, lines = tmp_path_factory.mktemp("charades"), []
    for number, (source, first, red, blue) in enumerate(
        [("bikes", 0, "", 0), ("bikes", 60, "0.00-0.48", 1), ("carphone_pristine", 0, "0.52-1.00", 0)] * 2
    ):
        frames = source_frames(source, first + 20 * (number > 2), 25, (64, 48)) // 2
        if red:
            frames[slice(0, 12) if red.startswith("0.00") else slice(13, 25), ..., 0] += 120
        frames[..., 2] += 120 * blue
        write_mp4(folder / f"{number}.mp4", frames)
        label = ",".join([f"5:{red}"] * bool(red) + ["80:0.00-1.00"] * blue) or "-"
        lines.append(f"{folder / f'{number}.mp4'} {label}")
    for name in ("train", "val"):
        write_lines(folder / f"{name}.csv", lines)
    write_lines(folder / "test.csv", [*lines[:3], f"{broken['text']} 5:0-1,9:0-1", *lines[3:]])
    return ["--data_set", "Charades", "--data_path", folder]


@pytest.fixture(scope="module")
def trained(run, charades, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    found = run(*charades, *TRAIN, "--epochs", "12", "--save_ckpt_freq", "100", "--output_dir", folder)
    assert found.code == 0, found.all
    return folder


def test_it_trains_and_tests(trained):
    *epochs, test = log_of(trained)
    assert len(epochs) == 12 and epochs[-1]["train_loss"] < epochs[0]["train_loss"] / 2
    assert "train_acc1" not in epochs[0]
    table, (best,) = per_class(trained), [line for line in epochs if line["epoch"] == read_best(trained)["epoch"]]
    assert best["val_map"] == read_best(trained)["map"] == max(line["val_map"] for line in epochs)
    assert sorted(table) == [5, 9, 80] and test["test_classes"] == 3 and test["test_unreadable"] == 1
    assert test["test_map"] == pytest.approx(np.mean([float(row["ap"]) for row in table.values()]), abs=0.01)
    assert float(table[9]["ap"]) == pytest.approx(100 / 7, abs=0.01)  # seen in the unreadable one alone: last of 7
    with np.load(trained / "test_predictions.npz") as file:
        assert np.array_equal(file["scores"][0], file["view_scores"][0].max(axis=0))


def read_best(folder):
    return torch.load(folder / "checkpoint-best.pth", map_location="cpu", weights_only=False)["best"]


def test_two_processes_find_the_same(run, charades, trained, tmp_path):
    best = ["--eval", "--finetune", trained / "checkpoint-best.pth", "--output_dir", tmp_path / "two"]
    found = run(*charades, *TRAIN, *best, processes=2)
    assert found.code == 0 and log_of(tmp_path / "two")[-1] == log_of(trained)[-1], found.all
    found = run(*charades, *TRAIN, *best[:-1], tmp_path / "mean", "--combine_views", "mean")
    with np.load(tmp_path / "mean" / "test_predictions.npz") as file:
        np.testing.assert_allclose(file["scores"][0], file["view_scores"][0].mean(axis=0), rtol=1e-6)
    assert found.code == 0, found.all


@pytest.mark.parametrize("how", ["--linear_probe --probe_lrs 0.1 0.01 --epochs 2", "--knn 2"])
def test_frozen_encoders(run, charades, tmp_path, how):
    torch.manual_seed(0)
    torch.save(MODELS["vit_tiny_patch16_224"](num_classes=0).state_dict(), tmp_path / "model.pth")
    options = ["--batch_size", "2", "--finetune", tmp_path / "model.pth", "--output_dir", tmp_path / "run"]
    found = run(*charades, *TINY, *FEW, *options, *how.split())
    assert found.code == 0, found.all
    test = log_of(tmp_path / "run")[-1]
    assert 0 < test["test_map"] <= 100 and test["test_classes"] == 3
    assert sorted(per_class(tmp_path / "run")) == [5, 9, 80]


def test_predict_prints_the_likeliest_classes(run, charades, trained):
    best = ["--finetune", trained / "checkpoint-best.pth", "--predict", charades[-1] / "1.mp4", "--output_dir", trained]
    found = run(*charades, *TRAIN, *best)
    rows = [line.split() for line in found.out.splitlines() if line[:2] in ("0.", "1.")]
    with np.load(trained / "test_predictions.npz") as file:
        scores = file["scores"][1]
    assert found.code == 0 and [int(row[1]) for row in rows] == np.argsort(-scores)[:5].tolist(), found.all
    assert [float(row[0]) for row in rows] == pytest.approx(np.sort(scores)[:-6:-1], abs=1e-4)


@pytest.mark.parametrize(
    "label, options, says",
    [
        ("", "", "train.csv, line 1: "),
        (" 5", "", "train.csv, line 1: "),
        (" 200:0-1", "", "train.csv, line 1: label 200 is not in [0, 157)"),
        (" -", "", "train.csv: none of its 1 videos shows any class"),
        (" 5:0-1", "--examples 1000", "--samples_per_class and --examples draw class by class"),
    ],
)
def test_one_clear_line(run, charades, tmp_path, label, options, says):
    for name in ("train", "val", "test"):
        video = charades[-1] / "1.mp4"
        write_lines(tmp_path / f"{name}.csv", [f"{video}{label if name == 'train' else ' 5:0-1'}"])
    found = run(*charades, "--data_path", tmp_path, *TRAIN, *options.split())
    [error] = [text for text in found.err.splitlines() if "error: " in text]
    assert found.code == 1 and says in error and "Traceback" not in found.all, found.all
