"""What a run survives, in seconds: odd videos, damaged checkpoints, a decoder that hangs or dies, a second run.

The long versions are in soak/. Resuming, signals and wrong input are tested with the program, in
test_run_smile_pretraining.py and test_run_smile_pretraining_input.py.
"""

import ctypes
import os
import signal
import time
from pathlib import Path

import pytest
from fixtures_video import source_frames
from soak import corpus, mutants
from soak.runs import OPTIONS, Run, children, gone, make_videos
from soak.test_checkpoints import refused, restored

import checkpoints
import video_transforms
from weights import read_checkpoint

pytest_plugins = "fixtures_programs"


def hang():
    """Have the decoder hang at a video, and heed no Python."""
    read = video_transforms.read_clip
    sleep = ctypes.CDLL(None).sleep
    video_transforms.read_clip = lambda path, *rest: sleep(1000) if path.endswith("7.mp4") else read(path, *rest)


def wait_shortly():
    """Have a second run wait for the first to go away for half a second."""
    checkpoints.LOCK_SECONDS = 0.5


@pytest.fixture(scope="module")
def list_file(tmp_path_factory):
    """A list of 16 short videos, 0.mp4 to 15.mp4."""
    return make_videos(tmp_path_factory.mktemp("videos"), 16)


@pytest.fixture
def start(start_program, list_file, tmp_path):
    """Start a run of 8 steps an epoch that would go on for long."""
    where = ["--data_path", list_file, "--output_dir", tmp_path / "run"]
    long = "--epochs 500 --save_ckpt_freq 500 --save_ckpt_steps 0".split()
    return lambda *argv, **how: start_program("run_smile_pretraining.py", *where, *OPTIONS, *long, *argv, **how)


def test_odd_and_broken_videos(tmp_path):
    frames = source_frames("bikes", 0, 12, (96, 64))
    whole = corpus.encode(frames)
    variants = {
        "10bit.mp4": corpus.encode(frames, pix_fmt="yuv420p10le"),
        "444.mp4": corpus.encode(frames, pix_fmt="yuv444p"),
        "vp9.webm": corpus.encode(frames, "webm", "libvpx-vp9"),
        "av1.mp4": corpus.encode(frames, codec="libsvtav1"),
        "mpeg4.avi": corpus.encode(frames, "avi", "mpeg4"),
        "ffv1.mkv": corpus.encode(frames, "matroska", "ffv1"),
        "one-frame.mp4": corpus.encode(frames[:1]),
        "variable-rate.mp4": corpus.encode(frames, stamps=[0, 1, 2, 10, 11, 40, 41, 42, 43, 44, 200, 201]),
        "portrait.mp4": corpus.encode(corpus.resized(frames, 54, 96)),
        "odd.mp4": corpus.encode(corpus.resized(frames, 33, 51), pix_fmt="yuv444p"),
    }
    broken = {
        "cut.mp4": whole[: len(whole) // 2],
        "headless.mp4": whole[300:],
        "sound.mp4": corpus.encode_sound("mp4"),
        "cut index first.mp4": corpus.encode(frames, muxer={"movflags": "faststart"})[:-500],
    }
    found = corpus.read_all((variants | broken).items(), tmp_path, corpus.read_video)
    outcomes = {name: outcome for name, (outcome, _) in found.items()}
    assert outcomes == dict.fromkeys(variants, "read") | dict.fromkeys(broken, "refused")


def test_checkpoints_that_are_damaged_or_do_not_fit(tmp_path):
    path, whole = tmp_path / "checkpoint.pth", mutants.as_bytes(mutants.content())
    for name, content in [*mutants.truncated(whole, 12), *mutants.flipped(whole, 4)]:
        path.write_bytes(content)
        if name.startswith(("cut", "flip-pickle", "flip-tensor")):
            assert refused(read_checkpoint, path), name
    for name in ("no-optimizer", "no-step", "fewer-groups", "fewer-parameters", "other-batch", "wider-exp_avg-0"):
        assert refused(restored, dict(mutants.wrong_run())[name], path), name


def check_error(run, *words):
    """The run fails with one line, in which these words are."""
    found = run.end()
    errors = [line for line in found.err.splitlines() if line.startswith("error: ")]
    assert found.code == 1 and len(errors) == 1 and "Traceback" not in found.all, found.all[-3000:]
    assert all(word in errors[0] for word in words), errors[0]


def test_a_decoder_that_hangs_stops_the_run(start):
    """The worker is gone afterwards."""
    run = start("--worker_timeout", "5", before=hang)
    run.wait_for("eta")
    workers = children(run.pid)
    check_error(run, "the data loader failed", "timed out after 5", "/7.mp4", "--worker_timeout")
    assert gone(workers)


def test_a_video_that_kills_the_decoder_stops_the_run(start, list_file, tmp_path):
    """decord 0.6 asks for room for all the frames that a file claims; beyond a billion that ends its process."""
    content = corpus.encode(source_frames("bikes", 0, 12, (64, 48)), "avi", "mjpeg", "yuvj420p")
    (tmp_path / "claims.avi").write_bytes(corpus.claim_frames(content, 2_000_000_000))
    (tmp_path / "list.csv").write_text(f"{tmp_path / 'claims.avi'} 0\n" + Path(list_file).read_text())
    run = start("--data_path", tmp_path / "list.csv", "--reader", "decord")
    check_error(run, "the data loader failed", "claims.avi")


def test_one_of_two_ranks_is_killed(list_file, tmp_path):
    """torchrun starts both again, and they go on from the latest checkpoint and find each other."""
    run = Run(list_file, tmp_path / "run", "--batch_size", "1", processes=2, restarts=2)
    run.wait_for(r"epoch 0 \[5/")
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert run.wait(300) == 0, run.text()[-3000:]
    [resumed] = run.find("resuming from")
    assert len(run.find("error: process 0 lost its connection to another process")) == 1 and not run.find(
        "in run_main"
    ), run.text()
    assert "checkpoint-latest.pth at epoch 0" in resumed and list(run.steps())[-1] == (1, 7)


def test_one_run_a_folder(start, tmp_path):
    first = start()
    first.wait_for("epoch 0 [1/")
    check_error(start(before=wait_shortly), f"--output_dir {tmp_path / 'run'}: another run is writing there")
    first.wait_for("eta", first.read("out").count("eta") + 8)  # it has not been disturbed
    first.stop()
    third = start(before=hang)  # at once: the lock has gone with its owner
    third.wait_for("eta")
    interrupt_twice(third)


def interrupt_twice(run):
    """The first SIGINT waits for the step to end, which it does not here; the second one ends the program at once."""
    workers = children(run.pid)
    time.sleep(1)
    os.kill(run.pid, signal.SIGINT)
    time.sleep(1)
    assert run.processes[0].is_alive()
    os.kill(run.pid, signal.SIGINT)
    assert run.end(60).code == -signal.SIGINT
    for pid in workers:  # one still hangs in the decoder
        os.kill(pid, signal.SIGKILL) if not gone([pid], 0) else None
