"""Features of a list against the encoder run by hand; the same from one and two processes, and after a kill."""

import argparse
import csv
import json
import shutil
import time

import numpy as np
import pytest
import torch
from fixtures_video import write_list

from datasets_finetune import ViewReader, WindowReader
from modeling_finetune import MODELS, channel_stats, normalize_clips

pytest_plugins = "fixtures_finetuning"
MODEL = "vit_tiny_patch16_224"
NAME = "run_feature_extraction.py"
TINY = ["--model", MODEL, *"--input_size 32 --num_frames 4 --num_workers 0 --sampling_rate 2".split()]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random encoder and its file, as pretraining writes it."""
    torch.manual_seed(0)
    model = MODELS[MODEL](num_classes=0).eval()
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint-3.pth"
    kept = {f"encoder.{name}": value for name, value in model.state_dict().items() if "fc_norm" not in name}
    torch.save({"model": kept}, path)
    return path, model


@pytest.fixture(scope="module")
def videos(clips, broken, tmp_path_factory):
    """A list of seven, the third of which is unreadable; and their paths."""
    paths = [*clips.values()]
    paths.insert(2, broken["text"])
    return write_list(tmp_path_factory.mktemp("list") / "list.csv", paths, 5), paths


@pytest.fixture(scope="module")
def options(encoder, videos):
    """One of the seven videos cannot be read."""
    return ["--data_path", videos[0], "--checkpoint", encoder[0], "--max_bad_fraction", 0.2, *TINY]


@pytest.fixture(scope="module")
def extract(run, options):
    """Run the program over the list; more options may follow."""
    return lambda folder, *argv, **how: run(*options, "--output_dir", folder, *argv, file=NAME, **how)


def index_of(folder):
    with open(folder / "index.csv", newline="") as file:
        return list(csv.DictReader(file))


def features_of(folder):
    """The row of each video, by the index."""
    return np.stack([np.load(folder / entry["file"])[int(entry["row"])] for entry in index_of(folder)])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def by_hand(encoder, path, reader):
    """Tokens after the last block, [V, t, h * w, D]."""
    caught = []
    hook = encoder.blocks[-1].register_forward_hook(lambda module, inputs, output: caught.append(output))
    with torch.no_grad():
        encoder(normalize_clips(reader(str(path)), *channel_stats("imagenet", "cpu")))
    hook.remove()
    return caught[0].unflatten(1, (2, 4)).numpy()


def test_features_are_tokens_after_the_last_block(extract, encoder, videos, tmp_path):
    reader, good = ViewReader("dense", 1, 1, 32, 4, 2), [0, 1, 3, 4, 5, 6]
    tokens = np.stack([by_hand(encoder[1], videos[1][number], reader) for number in good])
    for kind, expected in {
        "mean": tokens.mean(axis=(2, 3)), "time": tokens.mean(axis=3), "token": tokens.reshape(6, 1, 8, 192)
    }.items():  # fmt: skip
        done = extract(tmp_path / kind, "--features", kind)
        assert done.code == 0, done.all
        found = features_of(tmp_path / kind)
        assert found.dtype == np.float32 and np.isnan(found[2]).all() and tokens.std() > 0.1
        np.testing.assert_allclose(found[good], expected, atol=1e-4)


def test_clips_are_those_of_the_training(run, encoder, videos, tmp_path):
    """Model, frames, stride, size and sampling, unless they are given."""
    clip = {"num_frames": 4, "sampling_rate": 2, "input_size": 32, "model": MODEL, "data_set": "SSV2"}
    held = torch.load(encoder[0]) | {"args": argparse.Namespace(**clip, max_bad_fraction=0.05)}
    torch.save(held, tmp_path / "trained.pth")
    options = ["--data_path", videos[0], "--checkpoint", tmp_path / "trained.pth", "--max_bad_fraction", 0.2]
    options += ["--num_workers", 0, "--output_dir", tmp_path / "features"]
    done = run(*options, file=NAME)
    assert done.code == 0, done.all
    expected = by_hand(encoder[1], videos[1][0], ViewReader("segments", 1, 1, 32, 4, 2)).mean(axis=(1, 2))
    np.testing.assert_allclose(features_of(tmp_path / "features")[0], expected, atol=1e-4)
    other = run(*options, "--sampling", "dense", file=NAME)
    assert "was trained with --sampling segments (here dense)" in other.out and other.code == 1  # another folder
    windows = run(*options, "--stride", 4, "--output_dir", tmp_path / "windows", file=NAME)  # which are dense
    assert windows.code == 0 and "--sampling segments" not in windows.out, windows.all


def test_a_checkpoint_that_was_written_again(run, encoder, videos, tmp_path):
    """Not two models' features in a folder."""
    path, options = tmp_path / "model.pth", ["--data_path", videos[0], "--max_bad_fraction", 0.2, "--num_workers", 0]
    options += ["--model", MODEL, "--num_frames", 4, "--sampling_rate", 2, "--input_size", 32, "--checkpoint", path]
    weights = torch.load(encoder[0])
    for factor, code in ((1, 0), (1, 0), (2, 1)):
        torch.save({"model": {name: value * factor for name, value in weights["model"].items()}}, path)
        done = run(*options, "--output_dir", tmp_path / "features", file=NAME)
        assert done.code == code, done.all
    assert "--checkpoint (its weights) was" in done.err and "choose another --output_dir" in done.err


def test_several_views(extract, encoder, videos, tmp_path):
    views = "--num_segment 2 --num_crop 3 --sampling segments --dtype float16 --batch_size 4".split()
    done = extract(tmp_path / "views", *views)
    assert done.code == 0, done.all
    found, reader = features_of(tmp_path / "views"), ViewReader("segments", 2, 3, 32, 4, 2)
    assert found.shape == (7, 6, 192) and found.dtype == np.float16
    expected = by_hand(encoder[1], videos[1][0], reader).mean(axis=(1, 2))
    np.testing.assert_allclose(found[0], expected, atol=2e-3 * abs(expected).max())
    assert np.abs(found[0, 0] - found[0, 1]).max() > 0.01  # views differ


@pytest.fixture(scope="module")
def whole(extract, tmp_path_factory):
    """Features in files of two videos."""
    folder = tmp_path_factory.mktemp("whole")
    done = extract(folder, "--shard_size", 2)
    assert done.code == 0, done.all
    return folder


def test_one_and_two_processes_write_the_same_in_list_order(extract, videos, whole, tmp_path):
    """Also with more processes than files."""
    done = extract(tmp_path / "two", "--shard_size", 2, processes=2)
    assert done.code == 0 and contents(whole) == contents(tmp_path / "two"), done.all
    index = index_of(whole)
    assert [entry["path"] for entry in index] == [str(path) for path in videos[1]]
    assert [entry["video"] for entry in index] == list("0123456") and {entry["label"] for entry in index} == {"5"}
    assert [(entry["file"][9:14], entry["row"]) for entry in index] == [(f"{i // 2:05d}", str(i % 2)) for i in range(7)]
    assert [bool(entry["error"]) for entry in index] == [False, False, True, *4 * [False]]
    done = extract(tmp_path / "one file", "--shard_size", 100, processes=2)
    assert done.code == 0 and features_of(tmp_path / "one file").shape == (7, 1, 192), done.all


def test_a_killed_run_goes_on(start_program, extract, whole, options, tmp_path):
    killed = tmp_path / "killed"
    process, alive = start_program(NAME, *options, "--output_dir", killed, "--shard_size", 2), True
    while not list(killed.glob("features-*.npy")):
        assert alive
        time.sleep(0.002)
        alive = process.processes[0].is_alive()
    process.stop()
    before = {path: path.stat().st_mtime_ns for path in killed.glob("features-*.npy")}
    (killed / "features-00003.tmp").write_bytes(b"half a file")
    done = extract(killed, "--shard_size", 2)
    assert done.code == 0 and f"{4 - len(before)} of 4 files to compute" in done.out
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert contents(killed) == contents(whole)


def test_npz_files_stand_alone(extract, videos, whole, tmp_path):
    assert extract(tmp_path / "npz", "--format", "npz", "--shard_size", 4).code == 0
    files = [np.load(path) for path in sorted((tmp_path / "npz").glob("*.npz"))]
    np.testing.assert_array_equal(np.concatenate([file["features"] for file in files]), features_of(whole))
    assert [str(path) for file in files for path in file["paths"]] == [str(path) for path in videos[1]]
    assert [label for file in files for label in file["labels"]] == [5] * 7
    others = [f"{path} {label}" for path, label in zip(videos[1], ["guitar", "92:0.1-0.6,147:0-1", *"-012-"])]
    (tmp_path / "any.csv").write_text("\n".join(others))
    assert extract(tmp_path / "any", "--format", "npz", "--data_path", tmp_path / "any.csv").code == 0
    with np.load(tmp_path / "any" / "features-00000.npz") as file:
        assert [f"{path} {label}" for path, label in zip(file["paths"], file["labels"])] == others
    assert [f"{entry['path']} {entry['label']}" for entry in index_of(tmp_path / "any")] == others


def test_a_folder_takes_features_of_one_kind_only(extract, whole):
    before = contents(whole)
    done = extract(whole, "--features", "time", "--shard_size", 2, processes=2)
    assert done.code == 1 and done.all.count("settings.json: --features was mean, now time; choose another") == 1
    assert contents(whole) == before and json.loads(before["settings.json"])["precision"] == "fp32"


def test_too_many_unreadable_videos(extract, tmp_path):
    done = extract(tmp_path / "out", "--max_bad_fraction", 0.1)
    assert done.code == 1 and "error: 1 of 7 videos could not be read, more than --max_bad_fraction 0.1" in done.err
    assert len(index_of(tmp_path / "out")) == 7  # and yet nothing is lost


def test_windows_all_over_each_video(extract, encoder, videos, tmp_path):
    """Every 5 frames or 0.2 seconds, which is the same at 25 frames a second; one and two processes; a video twice."""
    for name, options in (("frames", ["--stride", 5]), ("seconds", ["--stride_seconds", 0.2])):
        done = extract(tmp_path / name, *options, "--batch_size", 3, processes=1 + (name == "seconds"))
        assert done.code == 0, done.all
        index, about = index_of(tmp_path / name), json.loads((tmp_path / name / "windows.json").read_text())
        assert about["window"] == 8 and list(about.values())[2] == options[1]
        assert {entry["label"] for entry in index} == {"5"}
        for path in videos[1]:
            rows = [entry for entry in index if entry["path"] == str(path)]
            if rows[0]["error"]:
                assert path == videos[1][2] and not (tmp_path / name / f"{path.stem}.npy").exists()
                continue
            found, total = np.load(tmp_path / name / f"{path.stem}.npy"), int(rows[0]["frames"])
            assert found.shape == (max(0, total - 8) // 5 + 1, 192) and len(rows) == len(found)
            assert about["videos"][path.stem] == {"windows": len(found), "rate": pytest.approx(25), "frames": total}
            for number, row in enumerate(rows):
                assert (int(row["row"]), row["file"]) == (number, f"{path.stem}.npy")
                assert float(row["start"]) == pytest.approx(number * 5 / 25)
                assert float(row["end"]) == pytest.approx(min(number * 5 + 8, total) / 25)
    reader = WindowReader("dense", 0, 1, 32, 4, 2, every=5)
    expected = by_hand(encoder[1], videos[1][0], reader).mean(axis=(1, 2))
    np.testing.assert_allclose(np.load(tmp_path / "frames" / "bikes.npy"), expected, atol=1e-4)
    done = extract(tmp_path / "frames", "--stride", 5)
    assert "1 of 7 files to compute" in done.out  # the unreadable one
    done = extract(tmp_path / "frames", "--stride", 6)
    assert done.code == 1 and "--stride was 5, now 6" in done.err


def test_videos_of_the_same_name_keep_their_folders(extract, clips, tmp_path):
    paths = [tmp_path / folder / "v.mp4" for folder in "ab"]
    for path, source in zip(paths, (clips["bikes.mp4"], clips["short.mp4"])):
        path.parent.mkdir()
        path.write_bytes(source.read_bytes())
    done = extract(tmp_path / "out", "--stride", 4, "--data_path", write_list(tmp_path / "l.csv", paths))
    assert done.code == 0, done.all
    lengths = [len(np.load(tmp_path / "out" / folder / "v.mp4.npy")) for folder in "ab"]
    assert lengths == [9, 1]


def test_a_folder_with_fewer_settings_is_gone_on_with(extract, whole, tmp_path):
    """An earlier version wrote no strides, and no sum of the weights."""
    old = shutil.copytree(whole, tmp_path / "old")
    known = json.loads((old / "settings.json").read_text())
    fewer = {name: value for name, value in known.items() if "stride" not in name and "weights" not in name}
    assert len(fewer) == len(known) - 3
    (old / "settings.json").write_text(json.dumps(fewer))
    done = extract(old, "--shard_size", 2)
    assert done.code == 0 and "0 of 4 files to compute" in done.out, done.all


@pytest.mark.parametrize(
    "words, message",
    [
        ("--checkpoint {t}/none.pth", "none.pth: no such checkpoint file"),
        ("--checkpoint=", "--checkpoint is missing"),
        ("--data_path {t}/none.csv", "none.csv: no such list file"),
        ("--shard_size 0", "--shard_size 0: must be at least 1"),
        ("--stride 4 --stride_seconds 1", "--stride and --stride_seconds: give one of them"),
        ("--stride_seconds nan", "--stride and --stride_seconds: give one of them"),
        ("--num_workers -1", "--num_workers -1: must be at least 0"),
        ("--stride 4 --num_crop 3", "--stride: windows are dense and central"),
        ("--input_size 40", "--input_size 40 is not divisible"),
        ("--model vit_small_patch16_224", "check --model"),
        ("--checkpoint hf://nobody", "hf://nobody: write hf://owner/repo"),
    ],
)
def test_wrong_arguments_are_one_line(extract, tmp_path, words, message):
    done = extract(tmp_path / "out", *words.format(t=tmp_path).split())
    assert done.code == 1 and message in done.err and len(done.err.splitlines()) == 1, done.all
    assert not list(tmp_path.glob("out/features*"))
