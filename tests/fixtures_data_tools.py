"""Videos with the faults that scripts/data looks for and mends, and a way to run its programs in processes.

A pytest plugin (``pytest_plugins = "fixtures_data_tools"``). No test here: PYTEST_DONT_REWRITE.
"""

import multiprocessing
import os
import time
from multiprocessing.connection import wait
from pathlib import Path

import av
import numpy as np
import pytest
from fixtures_video import source_frames, write_mp4

pytest_plugins = "fixtures_video"
SIZE = (160, 96)
FORK = multiprocessing.get_context("fork")


def set_matrix(path, *matrix):
    """Tell players how to turn and mirror an mp4: a, b, c, d in its track header, where (x, y) is shown at
    (a * x + c * y, b * x + d * y)."""
    data = bytearray(Path(path).read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # version 0: 40 bytes before the matrix
    a, b, c, d = (number << 16 for number in matrix)
    matrix = [a, b, 0, c, d, 0, 0, 0, 1 << 30]
    data[start : start + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in matrix)
    Path(path).write_bytes(data)


@pytest.fixture(scope="session")
def odd_videos(tmp_path_factory):
    """Videos by what is odd about them, and the frames that all of them (but the long one) were made of."""
    folder = tmp_path_factory.mktemp("odd")
    frames = source_frames("bikes", 40, 40, SIZE)
    fast = {"preset": "ultrafast", "crf": "12"}
    one_key = {"preset": "ultrafast", "x264-params": "keyint=infinite:scenecut=0"}
    kinds = {
        "plain.mp4": ("libx264", {"options": fast}),
        "uneven.mp4": ("libx264", {"options": fast, "stamps": [n + n // 3 for n in range(40)]}),
        "broken stamps.mp4": ("libx264", {"options": fast, "broken": True}),
        "turned.mp4": ("libx264", {"options": fast}),
        "b frames.avi": ("mpeg4", {"b_frames": 2, "options": {"qscale": "2", "flags": "+qscale"}}),
        "av1.mp4": ("libsvtav1", {"options": {"preset": "12", "crf": "15"}}),
        "vp9.webm": ("libvpx-vp9", {"options": {"deadline": "realtime", "cpu-used": "8", "crf": "10", "b": "2000000"}}),
    }
    for name, (codec, options) in kinds.items():
        if codec in av.codecs_available:
            write_mp4(folder / name, frames, codec, **options)
    set_matrix(folder / "turned.mp4", 0, 1, -1, 0)  # by 90 degrees clockwise, as telephones do
    long = np.concatenate([frames, frames[::-1]] * 2)
    write_mp4(folder / "one key.mp4", long, key_frames=10000, options=one_key)
    large = np.repeat(np.repeat(frames[:8], 6, axis=1), 6, axis=2)
    write_mp4(folder / "large.mp4", large, options=fast)
    return {path.name: path for path in folder.iterdir()}, frames


def start(main, argv, env=()):
    """Call a program's main in a process of its own, with variables `env`."""

    def quietly():
        os.environ.update(env)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        main(argv)

    process = FORK.Process(target=quietly)
    process.start()
    return process


def kill_at(main, argv, module, name, calls=1, done=False, pause=0.0, env=()):
    """Call a program's main in a process of its own, and kill it some seconds after a call of ``module.name``, by it
    or a worker of its: the first, or another one; when it begins, or is done. The program may end before.

    Nothing is looked for in files, which the program may be moving away. Returns the process that made the call.
    """
    reader, writer = FORK.Pipe(duplex=False)
    function = getattr(module, name)

    def told(*args, **kwargs):
        if not done:
            writer.send(os.getpid())
        result = function(*args, **kwargs)
        if done:
            writer.send(os.getpid())
        return result

    def watched(argv):
        setattr(module, name, told)
        main(argv)

    caller, process = None, start(watched, argv, env)
    for _ in range(calls):
        wait([reader, process.sentinel])
        caller = reader.recv() if reader.poll() else caller
    time.sleep(pause)
    process.kill()
    process.join()
    return caller
