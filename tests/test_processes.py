"""Several processes of the tools of scripts/data, as on several nodes: what they write is what one process writes."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fixtures_data_tools import kill_at, start
from fixtures_video import decode_all, source_frames, write_list, write_mp4
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "data"))
import check_videos
import pack_videos
import prepare_objects
import processes
import resize_videos
from processes import Team, process_place

from utils import RunError

pytest_plugins = "fixtures_data_tools"
SRUN = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3"}
NODES = ("RANK", "WORLD_SIZE", *SRUN)


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


def on_nodes(monkeypatch, world, main, argv, killed=None):
    """Call a program's main in `world` processes; exit codes. `killed`: rank, and what kill_at takes; then all end."""
    ranks = [rank for rank in range(world) if not killed or rank != killed[0]]
    processes = []
    for rank in ranks:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        processes.append(start(main, argv))
    if killed:
        monkeypatch.setenv("RANK", str(killed[0]))
        kill_at(main, argv, *killed[1:])
        for process in processes:
            process.kill()
    for process in processes:
        process.join()
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
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
def test_several_processes_write_what_one_writes(monkeypatch, tools, tmp_path, tool, world):
    """Byte for byte, but videos; one of three killed three times before: the first, and others."""
    main, options, module, name = tools[tool]
    end = "a.csv" if tool == "check" else ""
    main([*options, "--output", str(tmp_path / "one" / end), "--workers", "1"])
    argv = [*options, "--output", str(tmp_path / "several" / end), "--workers", "1"]
    for rank, calls in ((1, 2), (0, 1), (2, 3)) if world == 3 else ():
        on_nodes(monkeypatch, world, main, argv, (rank, module, name, calls))
    assert on_nodes(monkeypatch, world, main, argv) == [0] * world
    one, several = written(tmp_path / "one"), written(tmp_path / "several")
    assert one.keys() == several.keys() and len(one) > 2
    assert [path for path in one if not same(one[path], several[path])] == []


@pytest.mark.parametrize(
    "env, place",
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", **SRUN}, (1, 2)),
        (SRUN, (2, 3)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, (0, 1)),
    ],
)
def test_the_place_is_that_of_training(monkeypatch, env, place):
    """torchrun's variables before those of srun, and no others of Slurm's: INSTALL.md, utils.init_distributed."""
    for name in NODES:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert process_place() == place


def team_of(monkeypatch, folder, rank, world=2):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    return Team(folder)


def test_what_an_earlier_run_left_does_not_count(monkeypatch, tmp_path):
    """Neither its result nor its arrival: the first waits for those of this run, which come later."""
    monkeypatch.setattr(processes, "POLL", 0.01)
    old = [team_of(monkeypatch, tmp_path / "team", rank) for rank in (0, 1)]
    old[1].write("come", old[1].ticket)
    old[0].beat()
    old[1].begin()
    assert old[1].gather("old") == []
    old[1].write("come", "one that was killed before it could begin")
    first, second = (team_of(monkeypatch, tmp_path / "team", rank) for rank in (0, 1))
    first.begin()
    first.beat()

    def late(argv):
        second.begin()
        second.gather("new")

    process = start(late, [])
    assert first.gather("mine") == ["mine", "new"]
    process.join()
    assert process.exitcode == 0 and not (tmp_path / "team").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_has_ended_is_told_by_those_that_wait(monkeypatch, tmp_path, rank):
    monkeypatch.setattr(processes, "PATIENCE", 0.3)
    monkeypatch.setattr(processes, "POLL", 0.01)
    team = team_of(monkeypatch, tmp_path / "team", rank)
    with pytest.raises(RunError, match=f"process {1 - rank} of 2 has ended, or hangs: .* start the same command again"):
        team.begin()
        team.gather("mine")


def test_a_process_that_works_for_long_is_waited_for(monkeypatch, tmp_path):
    """Longer than the patience, with signs of life."""
    for name, value in {"PATIENCE": 1.0, "POLL": 0.01, "BEAT": 0.05}.items():
        monkeypatch.setattr(processes, name, value)
    first, second = (team_of(monkeypatch, tmp_path / "team", rank) for rank in (0, 1))

    def slow(argv):
        second.begin()
        for _ in second.share(range(120)):
            time.sleep(0.05)
        second.gather("late")

    process = start(slow, [])
    assert first.gather("mine") == ["mine", "late"]
    process.join()
