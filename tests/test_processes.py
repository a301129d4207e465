"""Several processes of the tools of scripts/data, as on several nodes: what they write is what one process writes."""

import os
import signal
import subprocess
import sys
import time

import check_videos
import numpy as np
import pack_videos
import prepare_objects
import processes
import pytest
import resize_videos
from fixtures_data_tools import FORK, kill_at, start
from fixtures_video import decode_all, launched, source_frames, write_list, write_mp4
from PIL import Image

from utils import EXIT_REQUEUE, leave_on_signal

pytest_plugins = "fixtures_data_tools"


@pytest.fixture
def tools(clips, broken, tmp_path):
    """By the name of a tool: its main function, options but --output, module and function that a kill waits for."""
    videos = []
    for number, frames in enumerate(np.split(source_frames("bikes", 0, 120, (96, 64)), 12)):
        write_mp4(tmp_path / f"{number}.mp4", frames)
        videos.append(tmp_path / f"{number}.mp4")
    listed = write_list(tmp_path / "l.csv", [*videos, broken["text"], tmp_path / "none.mp4", videos[3]])
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "noise").mkdir(parents=True)
    for number in range(12):
        image = Image.fromarray(rng.integers(0, 256, (9 if number == 7 else 40, 40, 4), dtype=np.uint8))
        image.save(tmp_path / "in" / "noise" / f"{number:02d}.png")
    return {
        "check": (check_videos.main, [listed], check_videos, "look"),
        "resize": (resize_videos.main, [listed], resize_videos, "put_in_place"),
        "pack": (pack_videos.main, [listed, "--shard_size", "10KB"], pack_videos, "put_in_place"),
        "objects": (prepare_objects.main, ["cutouts", str(tmp_path / "in")], prepare_objects, "put_in_place"),
    }


def on_nodes(world, main, argv, killed=None):
    """Call a program's main in `world` processes; exit codes. `killed`: rank, and what kill_at takes; then all end."""
    shared = launched(world)
    ranks = [rank for rank in range(world) if not killed or rank != killed[0]]
    processes = [start(main, argv, shared | {"RANK": str(rank)}) for rank in ranks]
    if killed:
        kill_at(main, argv, *killed[1:], env=shared | {"RANK": str(killed[0])})
        for process in processes:
            process.kill()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def written(folder):
    """Every file below a folder: its bytes with the folder's own name replaced, of a journal the sorted lines; of a
    video the frames, since x264 does not give the same bits every time.
    """
    files = {}
    for path in (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"):
        data = path.read_bytes().replace(os.fsencode(folder), b"OUT")
        if path.suffix == ".mp4":
            data = decode_all(path)
        elif path.suffix == ".jsonl":
            data = b"\n".join(sorted(line for line in data.split(b"\n") if line))
        files[path.relative_to(folder)] = data
    return files


def same(one, other):
    if isinstance(one, bytes):
        return one == other
    return one.shape == other.shape and np.abs(one.astype(int) - other).mean() < 2


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("tool", ["check", "resize", "pack", "objects"])
def test_several_processes_write_what_one_writes(tools, tmp_path, tool, world):
    """Byte for byte, but videos; one of three killed three times before: the first, and others."""
    main, options, module, name = tools[tool]
    end = "a.csv" if tool == "check" else ""
    main([*options, "--output", str(tmp_path / "one" / end), "--workers", "1"])
    argv = [*options, "--output", str(tmp_path / "several" / end), "--workers", "1"]
    for rank, calls in ((1, 2), (0, 1), (2, 3)) if world == 3 else ():
        on_nodes(world, main, argv, (rank, module, name, calls))
    assert on_nodes(world, main, argv) == [0] * world
    one, several = written(tmp_path / "one"), written(tmp_path / "several")
    assert one.keys() == several.keys() and len(one) > 2
    assert [path for path in one if not same(one[path], several[path])] == []


def test_what_is_refused_ends_all_processes_with_a_line(tools, tmp_path):
    """Both find results that were made with other settings; nobody waits for the other, and no traceback is shown."""
    argv = [*tools["resize"][1], "--output", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text('{"short_side": 3}')
    words, shared = [sys.executable, resize_videos.__file__, *argv], launched(2)
    started = [
        subprocess.Popen(words, env=os.environ | shared | {"RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [1, 1], said
    assert "was made with --short_side 3, not 256" in "".join(said) and "Traceback" not in "".join(said)


def test_a_process_that_waits_for_others_ends_at_a_signal():
    """With the code on which the job is queued again, as it would while it works."""
    reader, writer = FORK.Pipe(duplex=False)

    def wait_for_the_first(argv):
        leave_on_signal()
        processes.connect()
        processes.from_first(None)
        if os.environ["RANK"] == "0":
            signal.pause()
        writer.send("waits")
        processes.to_first("mine")

    shared = launched(2)
    started = [start(wait_for_the_first, [], shared | {"RANK": rank}) for rank in "01"]
    assert reader.recv() == "waits"
    time.sleep(0.5)
    os.kill(started[1].pid, signal.SIGUSR1)
    started[1].join(300)
    started[0].kill()
    assert started[1].exitcode == EXIT_REQUEUE
