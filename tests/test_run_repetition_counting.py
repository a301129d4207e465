"""The counting program as it is used: annotations in the real format, training, counting, resuming, bad input."""

import csv
import os
import shutil
import signal
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures_counting import write_annotation
from fixtures_programs import log_of
from fixtures_video import decode_all
from scipy.io import loadmat, savemat

import modeling_counting
from checkpoints import LATEST
from datasets_counting import TrainSegments, draw_cycles, pad_to_square, read_annotation, read_annotations, read_segment
from modeling_finetune import SIZES, vit_tiny_patch16_224
from utils import EXIT_REQUEUE
from weights import read_checkpoint

pytest_plugins = ("fixtures_counting", "fixtures_finetuning")
NAME = "run_repetition_counting.py"
NO_VIDEO = "Invalid data found when processing input"  # FFmpeg's words
TINY = "--model vit_tiny_patch16_224 --input_size 32 --num_frames 4 --num_workers 0 --log_interval 1"
STEPS = "--batch_size 4 --segments_per_video 2 --refine_steps 2 --opt adamw --epochs 2"
TRAIN = [*TINY.split(), *STEPS.split()]


@pytest.fixture(scope="session")
def start(start_program, repetitions):
    """Start the program on the data."""
    data = ["--data_path", repetitions.annotations, "--data_root", repetitions.videos]
    return lambda *argv, **how: start_program(NAME, *data, *TRAIN, *argv, **how)


@pytest.fixture(scope="session")
def count(start):
    """Run the program on the data to its end."""
    return lambda *argv, **how: start(*argv, **how).end()


@pytest.fixture(scope="session")
def trained(count, tmp_path_factory):
    """The folder of a run to its end."""
    folder = tmp_path_factory.mktemp("counted")
    found = count("--save_ckpt_freq", "1", "--output_dir", folder)
    assert found.code == 0, found.all
    return SimpleNamespace(folder=folder)


def errors_of(found):
    """What it printed to stderr, without the lines of the decoder's own."""
    return [line for line in found.err.splitlines() if not line.startswith("[")]


def table_of(folder):
    return list(csv.DictReader(open(folder / "test_counts.csv", newline="")))


# The program ----------------------------------------------------------------------------------------------------


def test_it_trains_validates_and_counts(trained, repetitions):
    log = log_of(trained.folder)
    assert [line.get("epoch") for line in log] == [0, 1, None]
    for line in log[:2]:
        assert line["steps"] == 3 and line["skipped_steps"] == 0  # 2 · 6 segments, 4 at a time
        assert line["train_loss"] == pytest.approx(line["train_class_loss"] + 50 * line["train_box_loss"], rel=1e-4)
    best = min(log[:2], key=lambda line: line["val_mae"])
    assert log[2] == {"test_mae": best["val_mae"], "test_obo": best["val_obo"]}
    assert read_checkpoint(trained.folder / "checkpoint-best.pth")["epoch"] == best["epoch"]
    rows = table_of(trained.folder)
    truth = {}
    for file in sorted((repetitions.annotations / "val").glob("*.mat")):
        bounds = loadmat(file)["label"]["temporal_bound"][0, 0].ravel()
        truth[str(repetitions.videos / "HandstandPushups" / f"{file.stem}.mp4")] = len(bounds) - 1
    assert {row["video"]: int(row["true"]) for row in rows} == truth and len(rows) == 3
    errors = [abs(np.floor(float(row["counted"]) + 0.5) - int(row["true"])) for row in rows]
    assert np.mean([error / int(row["true"]) for error, row in zip(errors, rows)]) == pytest.approx(log[2]["test_mae"])
    assert np.mean([error <= 1 for error in errors]) == pytest.approx(log[2]["test_obo"])


def test_eval_gives_the_same_counts_in_one_process_and_in_two(run, repetitions, trained, tmp_path):
    """With model, frames and size of the checkpoint."""
    data = ["--data_path", repetitions.annotations, "--data_root", repetitions.videos, "--num_workers", 0]
    best = trained.folder / "checkpoint-best.pth"
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        found = run(*data, "--eval", "--finetune", best, "--output_dir", folder, processes=processes, file=NAME)
        assert found.code == 0, found.all
        assert log_of(folder)[-1] == pytest.approx(log_of(trained.folder)[-1])
        for row, known in zip(table_of(folder), table_of(trained.folder), strict=True):
            assert row["video"] == known["video"]
            assert float(row["counted"]) == pytest.approx(float(known["counted"]), abs=0.002)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(start, count, trained, tmp_path):
    """The signal comes after a step, or in the validation that follows."""
    folder = tmp_path / "run"
    process = start("--save_ckpt_freq", "1", "--output_dir", folder)
    process.wait_for("epoch 0 [2/3]")
    os.kill(process.pid, signal.SIGTERM)
    assert process.end().code == EXIT_REQUEUE
    assert (folder / LATEST).exists() or (folder / "checkpoint-0.pth").exists()
    found = count("--save_ckpt_freq", "1", "--output_dir", folder)
    assert found.code == 0 and "resuming from" in found.out, found.all
    ours, theirs = (read_checkpoint(path / "checkpoint-1.pth") for path in (folder, trained.folder))
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in theirs["model"])
    assert ours["best"] == theirs["best"] and log_of(folder)[-1] == log_of(trained.folder)[-1]


def one_bad_loss():
    """Have the second loss be infinite, though its gradient is not."""
    function, calls = modeling_counting.counting_loss, []

    def counting_loss(*values):
        calls.append(values)
        loss, parts = function(*values)
        return loss + (float("inf") if len(calls) == 2 else 0.0), parts

    modeling_counting.counting_loss = counting_loss


def test_a_bad_loss_costs_one_update(count, tmp_path):
    """Of the five updates that are made with the same segments the second one is left out."""
    found = count("--epochs", 1, "--refine_steps", 5, "--output_dir", tmp_path, before=one_bad_loss)
    assert found.code == 0, found.all
    state = read_checkpoint(tmp_path / "checkpoint-0.pth")["optimizer"]["state"]
    assert {float(values["step"]) for values in state.values()} == {3 * 5 - 1}
    assert log_of(tmp_path)[0]["skipped_steps"] == 1


def test_two_processes_train_as_one_that_accumulates(count, tmp_path):
    options = ["--epochs", "1", "--batch_size", "2", "--output_dir"]
    one = count(*options, tmp_path / "one", "--update_freq", "2")
    two = count(*options, tmp_path / "two", processes=2)
    assert one.code == 0 and two.code == 0, one.all + two.all
    ours, theirs = (read_checkpoint(tmp_path / name / "checkpoint-0.pth")["model"] for name in ("one", "two"))
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-3, atol=1e-4)


def test_a_pretrained_encoder_is_taken(count, tmp_path):
    torch.manual_seed(5)
    encoder = vit_tiny_patch16_224(num_classes=7)
    torch.save({"model": encoder.state_dict()}, tmp_path / "tuned.pth")
    options = ["--finetune", tmp_path / "tuned.pth", "--lr", "0", "--min_lr", "0", "--epochs", "1"]
    found = count(*options, "--output_dir", tmp_path / "run")
    assert found.code == 0, found.all
    ours = read_checkpoint(tmp_path / "run" / "checkpoint-0.pth")["model"]
    assert torch.equal(ours["encoder.blocks.3.mlp.fc2.weight"], encoder.blocks[3].mlp.fc2.weight)
    assert ours["head.box_1.weight"].shape == (7, 2 * SIZES["tiny"].embed_dim)


def test_a_dry_run_writes_nothing(count, tmp_path):
    found = count("--dry_run", "--output_dir", tmp_path / "run")
    assert found.code == 0 and "steps went well" in found.out and "test:" not in found.out, found.all
    assert not (tmp_path / "run").exists()


# Annotations ----------------------------------------------------------------------------------------------------


def test_an_annotation_is_read(tmp_path):
    write_annotation(tmp_path / "a.mat", [37, 91, 143, 189], 30, 200)
    found = read_annotation(tmp_path / "a.mat", "a.avi")
    assert (found.video, found.first, found.last, len(found.bounds) - 1) == ("a.avi", 29, 199, 3)
    assert found.bounds.tolist() == [36, 90, 142, 188]


WRONG_FRAMES = "must be increasing whole numbers from 1"
HEAD = b"MATLAB 5.0 MAT-file".ljust(124)
GARBAGE = {
    "text": b"not an annotation\n" * 40,
    "empty": b"",
    "HDF5, as newer MATLAB writes": HEAD + struct.pack("<H", 0x0200) + b"IM\x89HDF\r\n",
    "damaged": HEAD + struct.pack("<H", 0x0100) + b"IM" + struct.pack("<II", 15, 99) + b"xyz",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_file_that_is_no_annotation_is_refused(tmp_path, name):
    (tmp_path / "a.mat").write_bytes(GARBAGE[name])
    with pytest.raises(ValueError, match=r"a\.mat: not an annotation of UCFRep, a struct `label` in a .mat \(") as told:
        read_annotation(tmp_path / "a.mat", "a.avi")
    assert "\n" not in str(told.value)


def test_the_program_names_a_file_that_is_no_annotation(count, repetitions, tmp_path):
    shutil.copytree(repetitions.annotations, tmp_path / "data")
    victim = sorted((tmp_path / "data" / "train").glob("*.mat"))[2]
    victim.write_bytes(GARBAGE["damaged"])
    found = count("--data_path", tmp_path / "data")
    assert found.code == 1 and found.err.count("\n") == 1, found.all
    assert found.err.startswith(f"error: {victim}: not an annotation of UCFRep")


def label_with(**change):
    """What an annotation holds, with another value somewhere; None: left out."""
    label = {"start_frame": 1.0, "end_frame": 45.0, "temporal_bound": [[1.0], [20.0], [45.0]]} | change
    return {"label": {key: value for key, value in label.items() if value is not None}}


@pytest.mark.parametrize(
    "content, message",
    [
        (label_with(temporal_bound=[[1.0], [20.0]]), "1 cycles; there must be at least 2"),
        (label_with(temporal_bound=[[1.0], [20.0], [15.0]]), WRONG_FRAMES),
        (label_with(temporal_bound=[[0.0], [20.0], [45.0]]), WRONG_FRAMES),
        (label_with(temporal_bound=[[1.0], [np.nan], [45.0]]), WRONG_FRAMES),
        (label_with(start_frame=50.0), WRONG_FRAMES),
        (label_with(end_frame=None), "not an annotation of UCFRep"),
        (label_with(temporal_bound="many"), "not an annotation of UCFRep"),
        ({"weights": np.eye(3)}, "not an annotation of UCFRep.*KeyError.*label"),
        ({"label": np.eye(3)}, "not an annotation of UCFRep"),
    ],
)
def test_an_annotation_with_wrong_contents_is_reported(tmp_path, content, message):
    savemat(tmp_path / "a.mat", content)
    with pytest.raises(ValueError, match=rf"a\.mat: .*{message}") as error:
        read_annotation(tmp_path / "a.mat", "a.avi")
    assert "\n" not in str(error.value)


def test_every_byte_matters_or_is_reported(repetitions, tmp_path):
    """Cut off anywhere, a file is refused with a ValueError and nothing else."""
    whole = next((repetitions.annotations / "val").glob("*.mat")).read_bytes()
    for length in range(0, len(whole), 37):
        (tmp_path / "cut.mat").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.mat: not an annotation"):
            read_annotation(tmp_path / "cut.mat", "")


def test_two_videos_of_one_name_are_reported(repetitions, tmp_path):
    (tmp_path / "videos").mkdir()
    name = next(repetitions.videos.glob("*/*_c02.mp4"))
    for folder in ("a", "b"):
        (tmp_path / "videos" / folder).mkdir()
        shutil.copy(name, tmp_path / "videos" / folder)
    with pytest.raises(ValueError, match=f"two videos of one name, .*/a/{name.name} and .*/b/{name.name}"):
        read_annotations(str(repetitions.annotations / "val"), str(tmp_path / "videos"))


def test_missing_videos_and_folders_are_reported(count, repetitions, tmp_path):
    found = count("--data_root", tmp_path)
    wanted = f"{repetitions.annotations}/train: 6 of 6 videos are not in --data_root {tmp_path}, the first: v_"
    assert found.code == 1 and wanted in found.err and found.err.count("\n") == 2, found.all
    found = count("--data_path", tmp_path)
    assert found.code == 1 and f"{tmp_path}/train: no annotations there (*.mat)" in found.err


def test_a_video_that_cannot_be_read_is_named(count, repetitions, tmp_path):
    """One to be counted; and one to train on, in the program itself or in a worker."""
    for broken, options in (("*_c02.mp4", ["--epochs", "1"]), ("*_c01.mp4", []), ("*_c01.mp4", ["--num_workers", 1])):
        shutil.copytree(repetitions.videos, tmp_path / "videos", dirs_exist_ok=True)
        victim = sorted((tmp_path / "videos" / "HandstandPushups").glob(broken))[1]
        victim.write_text("no video\n" * 100)
        found = count("--data_root", tmp_path / "videos", *options)
        assert found.code == 1 and errors_of(found) == [f"error: {victim}: {NO_VIDEO}"], found.all


def test_nothing_to_test_is_reported(count, tmp_path):
    found = count("--eval", "--output_dir", tmp_path / "none")
    assert found.code == 1 and "nothing to test: give --finetune" in found.err


# Segments -------------------------------------------------------------------------------------------------------


def test_parts_of_a_video_have_whole_cycles():
    rng = np.random.default_rng(0)
    bounds = np.array([3, 20, 45, 60, 90])
    drawn = {tuple(draw_cycles(rng, bounds, 60)) for _ in range(300)}
    assert drawn == {(3, 20, 45), (3, 20, 45, 60), (20, 45, 60), (45, 60, 90)}
    assert {tuple(draw_cycles(rng, bounds, 10)) for _ in range(50)} == {(20, 45, 60)}  # the shortest there is


def test_every_number_of_cycles_is_as_likely():
    rng, bounds = np.random.default_rng(0), np.arange(10) * 12
    drawn = [draw_cycles(rng, bounds, 100) for _ in range(3500)]
    numbers = np.bincount([len(run) - 1 for run in drawn], minlength=10)
    assert (numbers[:2] == 0).all() and numbers[9] == 0  # 109 frames
    np.testing.assert_allclose(numbers[2:9], 500, atol=100)  # 4.8 standard deviations
    np.testing.assert_allclose(np.bincount([run[0] // 12 for run in drawn if len(run) == 3]), 62, atol=35)


def test_a_segment_has_the_frames_that_the_annotation_names(repetitions):
    """Against another decoder; half of them mirrored; a file beside a video that only shares its name is none."""
    for video in repetitions.videos.glob("*/*.avi"):
        video.with_suffix(".txt").write_text("notes")
    videos = read_annotations(str(repetitions.annotations / "train"), str(repetitions.videos))
    dataset = TrainSegments(videos, per_video=3, max_frames=40, side=64, seed=0)
    assert len(dataset) == 18
    mirrored = 0
    for index in range(len(dataset)):
        sample = dataset[0, index]
        first, last = sample["bounds"][0], sample["bounds"][-1]
        frames = decode_all(dataset.videos.path(index))[first : last + 1].astype(int)
        assert sample["frames"].shape == (last - first + 1, 64, 64, 3) and sample["path"] == dataset.videos.path(index)
        seen = sample["frames"][:, 8:56]  # 64 x 48 in the middle of 64 x 64
        errors = [np.abs(seen - other).mean() for other in (frames, frames[:, :, ::-1])]
        assert min(errors) < 3 and (sample["frames"][:, :8] == 0).all() and (sample["frames"][:, 56:] == 0).all()
        mirrored += errors[1] < errors[0]
        assert len(sample["frames"]) <= 40 or len(sample["bounds"]) == 3
    assert 3 <= mirrored <= 15


def test_a_sample_is_the_same_every_time(repetitions):
    videos = read_annotations(str(repetitions.annotations / "train"), str(repetitions.videos))
    one, two = (TrainSegments(videos, 2, 300, 32, seed=3)[1, 4] for _ in range(2))
    other = TrainSegments(videos, 2, 300, 32, seed=3)[2, 4]
    assert np.array_equal(one["frames"], two["frames"]) and one["seed"] == two["seed"] != other["seed"]


def test_squares_keep_the_aspect_ratio():
    frame = np.full((30, 60, 3), 200, np.uint8)
    square = pad_to_square(frame, 32)
    assert (square[8:24] == 200).all() and (square[:8] == 0).all() and (square[24:] == 0).all()
    assert (pad_to_square(frame.transpose(1, 0, 2), 32) == square.transpose(1, 0, 2)).all()


def test_a_video_much_shorter_than_its_annotation_is_reported(clips, tmp_path):
    write_annotation(tmp_path / "a.mat", [1, 20, 43], 1, 43)
    annotation = read_annotation(tmp_path / "a.mat", str(clips["bikes.mp4"]))  # 40 frames: the last is repeated
    frames = read_segment(annotation, 30, 42, 32, "pyav")
    assert len(frames) == 13 and (frames[9:] == frames[9]).all()
    write_annotation(tmp_path / "b.mat", [1, 20, 46], 1, 46)
    with pytest.raises(Exception, match="annotated up to frame 46, but it has 40"):
        read_segment(read_annotation(tmp_path / "b.mat", str(clips["bikes.mp4"])), 0, 45, 32, "pyav")
