"""Make videos small and quick to load: H.264 in mp4, a small short side, a key frame every few frames.

    python scripts/data/resize_videos.py lists/train.csv lists/val.csv --output /fast/k400
    python scripts/data/resize_videos.py lists/train.csv --output /fast/k400 --workers 32 --short_side 320

Written below --output:
    videos/...      every video of the lists once, in the folders of the original
    *.csv           the lists with the new paths, without the videos that failed
    failed.tsv      the videos that failed, and why
Reads whatever FFmpeg reads, including AV1 and VP9. Every result is read again and compared with its source before it
gets its name. The same command, started again, writes what is missing and tries failed videos again.
"""

import argparse
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

from data_tools import (
    common_folder,
    is_made,
    list_parser,
    put_in_place,
    read_lists,
    status,
    without_suffixes,
    write_lists,
    write_table,
)
from processes import make_all
from video_writing import USUAL_RATE, Settings, Written, write_resized

from shards import problem_of
from utils import RunError, rank, run_main


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = list_parser(__doc__, "video", 1800)
    add, kept = partial(parser.add_argument, type=int), "folder whose sub-folders are kept"
    parser.add_argument("--root", default="", help=f"{kept} (default: what all have in common)")
    add("--short_side", default=Settings.short_side, help="pixels; smaller videos keep theirs (default %(default)s)")
    add("--key_frames", default=Settings.key_frames, help="one every so many frames (default %(default)s)")
    add("--crf", default=Settings.crf, help="x264's quality, 0 to 51, lower is better (default %(default)s)")
    b_frames = "frames between two others that need not be decoded; -1: the preset's (default %(default)s)"
    add("--b_frames", default=Settings.b_frames, help=b_frames)
    parser.add_argument("--preset", default=Settings.preset, help="x264's effort (default %(default)s)")
    args = parser.parse_args(argv)
    if args.short_side < 16 or args.key_frames < 1 or not 0 <= args.crf <= 51 or not -1 <= args.b_frames <= 16:
        parser.error("needed: --short_side at least 16, --key_frames 1, --crf in [0, 51], --b_frames in [-1, 16]")
    return args


def plan(sources: list[str], root: str, videos: Path) -> dict[str, Path]:
    """Path of the result of each source: its path below `root`, as mp4. Raises RunError if it would be overwritten."""
    places = [os.path.abspath(source) for source in sources]
    targets, originals = {}, set(places)
    for source, stem in zip(sources, without_suffixes(places)):
        below = os.path.relpath(stem, root)
        if below.split(os.sep)[0] == "..":
            raise RunError(f"{source} is not below --root {root}")
        targets[source] = videos / f"{below}.mp4"
        if os.path.abspath(targets[source]) in originals:
            raise RunError(f"--output {videos.parent}: {targets[source]} is one of the originals")
    return targets


def resize(job: tuple[str, Path], settings: Settings, unfinished: Path) -> Written | None:
    """Write one video (source, target) to a file of this process and rename it; None if it is there already."""
    source, target = job
    if is_made(target, source):
        return None
    file = unfinished / f"{os.getpid()}.mp4"
    written = write_resized(source, str(file), settings)
    put_in_place(file, target)
    return written


def main(argv: list[str] | None = None) -> None:
    """Resize the videos of the lists; print the totals before and after."""
    args = get_args(argv)
    lists, videos = read_lists(args.lists), args.output / "videos"
    sources = list(dict.fromkeys(os.path.join(args.data_root, line.name) for part in lists.values() for line in part))
    root = os.path.abspath(args.root) if args.root else common_folder(sources)
    targets = plan(sources, root, videos)
    settings = Settings(args.short_side, args.key_frames, args.crf, args.preset, args.b_frames)
    # With another root two originals could have the same target, so it is a setting of the folder.
    fixed, jobs = asdict(settings) | {"root": root}, list(targets.items())
    outcomes = make_all(args, fixed, lambda: jobs, partial(resize, settings=settings), "videos")
    if rank() > 0:
        return
    reasons = {source: reason for (source, _), _, reason in outcomes if reason}
    made = [written for _, written, _ in outcomes if written]
    if there := len(targets) - len(reasons) - len(made):
        print(f"{there} of {len(targets)} videos are there already")
    failed = [(source, reasons[source]) for source in targets if source in reasons]
    write_table(args.output / "failed.tsv", ("path", "reason"), failed)
    done = {source: target for source, target in targets.items() if source not in reasons}
    sizes = [(status(source)[0], target.stat().st_size) for source, target in done.items() if not problem_of(source)]
    before, after = (sum(size[column] for size in sizes) for column in (0, 1))
    times = f"{after / max(1, before):.2f} times"
    print(f"{len(done)} videos, {before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB after ({times})")
    if made:
        psnr, minutes = [written.psnr for written in made], sum(written.seconds for written in made) / 60
        print(f"made now: {len(made)}, {minutes:.1f} minutes, PSNR {min(psnr):.1f} to {max(psnr):.1f} dB")
    if guessed := sum(written.guessed_rate for written in made):
        print(f"{guessed} have no timestamps and no frame rate: {USUAL_RATE} frames per second were assumed")
    if failed:
        print(f"{len(failed)} failed, the first: {': '.join(failed[0])} (see {args.output}/failed.tsv)")
    place = lambda target: str(target.relative_to(videos)) if args.relative else os.path.abspath(target)
    write_lists(args, lists, {source: place(target) for source, target in done.items()})


if __name__ == "__main__":
    run_main(main)
