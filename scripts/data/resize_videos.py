"""Videos made small and quick to load: H.264 in mp4, a small short side, a key frame every few frames.

    python scripts/data/resize_videos.py lists/train.csv lists/val.csv --output /fast/k400
    python scripts/data/resize_videos.py lists/train.csv --output /fast/k400 --workers 32 --short_side 320

Written below --output:
    videos/...      every video of the lists once, in the folders of the original
    *.csv           the lists with the new paths, without the videos that failed
    failed.tsv      the videos that failed, and why
Reads whatever FFmpeg reads, AV1 and VP9 too. Every result is read again and compared before it gets its name. The same
command, started again after any end, does what is left; videos that failed are tried again. The defaults were chosen by
measurement (DATASET.md, scripts/data/measure_resizing.py).
"""

import argparse
import os
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path

from data_tools import (
    RunError,
    common_folder,
    is_made,
    names_differ,
    output_folder,
    put_in_place,
    read_list,
    without_suffixes,
    write_lists,
    write_table,
)
from processes import Team, in_processes
from video_writing import USUAL_RATE, Settings, Written, write_resized

from shards import problem_of, status
from utils import run_main

Job = tuple[str, Path]  # source, target


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", nargs="+", help="lists with lines `path label`")
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--data_root", default="", help="folder that relative paths in the lists start from")
    parser.add_argument(
        "--root", default="", help="folder below which the originals' folders are kept (default: the one all share)"
    )
    parser.add_argument(
        "--relative", action="store_true", help="write paths relative to OUTPUT/videos, for --data_root"
    )
    parser.add_argument(
        "--short_side",
        type=int,
        default=Settings.short_side,
        help="pixels; smaller videos keep theirs (default %(default)s)",
    )
    parser.add_argument(
        "--key_frames",
        type=int,
        default=Settings.key_frames,
        help="a key frame every so many frames (default %(default)s)",
    )
    parser.add_argument(
        "--crf", type=int, default=Settings.crf, help="x264's quality, 0 to 51, lower is better (default %(default)s)"
    )
    parser.add_argument(
        "--b_frames",
        type=int,
        default=Settings.b_frames,
        help="frames between two others that need not be decoded; -1: as the preset has them (default %(default)s)",
    )
    parser.add_argument("--preset", default=Settings.preset, help="x264's effort (default %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: one for each core)"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one video (default %(default)s)")
    args = parser.parse_args(argv)
    if args.short_side < 16 or args.key_frames < 1 or not 0 <= args.crf <= 51 or args.workers < 1:
        parser.error("--short_side must be at least 16, --key_frames and --workers 1, --crf in [0, 51]")
    if not -1 <= args.b_frames <= 16:
        parser.error(f"--b_frames {args.b_frames}: must lie in [-1, 16]")
    names_differ(parser, args.lists)
    return args


def plan(sources: list[str], root: str, videos: Path) -> dict[str, Path]:
    """Where the result of each source goes: its path below `root`, as mp4.

    Raises:
        RunError: a source is not below `root`, or would be overwritten.
    """
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


def resize(job: Job, settings: Settings, unfinished: Path) -> Written:
    """Make one video in a file of this process's own, then give it its place. Raises Unusable."""
    source, target = job
    file = unfinished / f"{os.getpid()}.mp4"
    written = write_resized(source, str(file), settings)
    put_in_place(file, target)
    return written


def resize_all(
    args: argparse.Namespace, root: str, targets: dict[str, Path]
) -> tuple[dict[str, str], list[Written]] | None:
    """Print how many are there, and make the others.

    Returns:
        reasons of the sources that failed, and what was made, by all processes; None but in the first one.
    """
    # With another root two originals could claim the same place, so it belongs to the folder's settings.
    settings = Settings(args.short_side, args.key_frames, args.crf, args.preset, args.b_frames)
    failed, made, team = {}, [], Team(Path(args.output) / ".team")
    with output_folder(Path(args.output), asdict(settings) | {"root": root}, team.rank) as unfinished:
        team.begin()
        mine = [(job, is_made(job[1], job[0])) for job in team.share(targets.items())]
        todo = [job for job, made_before in mine if not made_before]
        work = partial(resize, settings=settings, unfinished=unfinished)
        for job, written, reason in in_processes(work, todo, args.workers, args.timeout, "videos", team):
            if reason:
                failed[job[0]] = reason
            else:
                made.append(astuple(written))
        results = team.gather((len(mine) - len(todo), failed, made))
    if not results:
        return None
    if there := sum(result[0] for result in results):
        print(f"{there} of {len(targets)} videos are there already")
    failed = {source: reason for result in results for source, reason in result[1].items()}
    written_ones = [Written(*row) for result in results for row in result[2]]
    return {source: failed[source] for source in targets if source in failed}, written_ones


def main(argv: list[str] | None = None) -> None:
    """Resize the videos of the lists; print the totals before and after."""
    args = get_args(argv)
    lists = {path: read_list(path) for path in args.lists}
    sources = list(dict.fromkeys(os.path.join(args.data_root, line.name) for part in lists.values() for line in part))
    root = os.path.abspath(args.root) if args.root else common_folder(sources)
    targets = plan(sources, root, Path(args.output) / "videos")
    if not (outcome := resize_all(args, root, targets)):
        return
    failed, made = outcome
    write_table(Path(args.output) / "failed.tsv", ("path", "reason"), list(failed.items()))
    there = [job for job in targets.items() if job[0] not in failed and not problem_of(job[0])]
    before, after = (sum(status(str(job[place]))[0] for job in there) for place in (0, 1))
    print(
        f"{len(targets) - len(failed)} videos, {before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB after"
        f" ({after / max(1, before):.2f} times)"
    )
    if made:
        psnr = sorted(written.psnr for written in made)
        minutes = sum(written.seconds for written in made) / 60
        print(f"made now: {len(made)}, {minutes:.1f} minutes, PSNR {psnr[0]:.1f} to {psnr[-1]:.1f} dB")
    if guessed := sum(written.guessed_rate for written in made):
        print(f"{guessed} have no time stamps and no frame rate: {USUAL_RATE} frames a second were taken")
    if failed:
        print(
            f"{len(failed)} failed, the first: {': '.join(next(iter(failed.items())))} (see {args.output}/failed.tsv)"
        )
    place = lambda target: (
        str(target.relative_to(Path(args.output) / "videos")) if args.relative else os.path.abspath(target)
    )
    places = {source: place(target) for source, target in targets.items() if source not in failed}
    write_lists(Path(args.output), lists, args.data_root, places)


if __name__ == "__main__":
    run_main(main)
