"""Find the videos of a list that cannot be read, that are read wrongly, and that load slowly.

    python scripts/data/check_videos.py lists/train.csv --output lists/train.good.csv
    python scripts/data/check_videos.py lists/train.csv --output lists/train.good.csv --full --workers 32

Each video is decoded from start to end, and frames that the reader finds by their numbers, at random places (--full:
all of them), are compared with that sequence. --output lists the videos that are read correctly. Beside it (here
``lists/train.good``), ``.bad.tsv`` has line, path and reason of the videos that cannot be read, ``.wrong.tsv`` of those
with wrong frames, ``.slow.tsv`` of those that load slowly. A video that hangs the decoder or kills its process is a bad
one. The same command, started again, looks only at new and changed videos (``.seen.jsonl``).
"""

import argparse
import glob
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from data_tools import add_work_options, new_parser, positive, read_list, status, write_list, write_table, write_text
from processes import connect, from_first, in_processes, share, to_first

from lists import why_missing
from utils import RunError, rank, run_main
from video_check import slow_reasons, wrong_frames
from video_reader import READERS, VideoError

PLACES = 16  # frames of each video that are compared
REMEDIES = {
    ".bad.tsv": "",
    ".wrong.tsv": "scripts/data/resize_videos.py writes a file that every reader decodes correctly",
    ".slow.tsv": "make it fast with scripts/data/resize_videos.py",
}


class Verdict(NamedTuple):
    """Why a video cannot be read ("" if it can), which frames are wrong ("" if none), and why it loads slowly."""

    bad: str
    wrong: str = ""
    slow: tuple[str, ...] = ()


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = new_parser(__doc__)
    parser.add_argument("list", help="list with lines `path label`")
    parser.add_argument("--output", required=True, type=Path, help="the list of the readable videos, a .csv file")
    parser.add_argument("--data_root", default="", help="folder that relative paths in the list start from")
    parser.add_argument("--full", action="store_true", help=f"compare all frames of each video, not only {PLACES}")
    parser.add_argument("--reader", choices=READERS, default="pyav", help="the reader to be used (default pyav)")
    parser.add_argument("--input_size", type=positive, default=224, help="side of the clips, pixels (default 224)")
    add_work_options(parser, "video", 120)
    args = parser.parse_args(argv)
    if args.output.suffix != ".csv" or args.output.resolve() == Path(args.list).resolve():
        parser.error("--output must be a .csv file other than the list")
    return args


def state_of(path: str, args: argparse.Namespace) -> list[Any] | None:
    """Size and time of a file, and how it is checked: an earlier verdict counts if all is the same. None: no file."""
    try:
        return [*status(path), args.full, args.input_size, args.reader]
    except OSError:
        return None


def look(path: str, full: bool, size: int, reader: str) -> Verdict:
    """Compare frames of a video with FFmpeg's sequence, and look for what makes it slow."""
    try:
        wrong = wrong_frames(path, np.random.default_rng(0), reader, 0 if full else PLACES)
        return Verdict("", wrong, tuple(slow_reasons(path, size)))
    except VideoError as error:
        return Verdict(str(error))


def read_seen(journals: Iterable[Path]) -> dict[str, tuple[list[Any], Verdict]]:
    """Read states and verdicts of earlier runs; a line that was cut off by a kill is ignored."""
    seen = {}
    for line in (line for path in journals for line in path.read_text().splitlines()):
        with suppress(json.JSONDecodeError):
            name, state, verdict = json.loads(line)
            seen[name] = state, Verdict(*verdict)
    return seen


def check(args: argparse.Namespace, paths: list[str], journals: list[Path]) -> dict[str, Verdict]:
    """Check each path, unless the journals have an up-to-date verdict; append new ones to this process's journal."""
    seen = read_seen(journals)
    states = {path: state_of(path, args) for path in paths}
    verdicts = {path: seen[path][1] for path in paths if path in seen and seen[path][0] == states[path]}
    missing = [path for path in paths if states[path] is None]
    verdicts |= {path: Verdict(why_missing(path).replace(f": {path}", "", 1)) for path in missing}
    todo = [path for path in paths if path not in verdicts]
    with open(args.output.with_suffix(f".seen.{rank()}.jsonl" if rank() else ".seen.jsonl"), "a") as journal:
        journal.write("\n" * bool(seen))  # the last line may have been cut off
        work = partial(look, full=args.full, size=args.input_size, reader=args.reader)
        for path, verdict, lost in in_processes(work, todo, args.workers, args.timeout, "videos"):
            verdicts[path] = verdict or Verdict(lost)
            if verdict:  # a lost process may have been a matter of time or memory
                journal.write(json.dumps([path, states[path], verdict]) + "\n")
                journal.flush()
    return verdicts


def check_together(args: argparse.Namespace, paths: list[str]) -> dict[str, Verdict]:
    """Check the paths in all processes and merge their journals; returns the verdicts in the first process only."""
    connect()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pattern, journal = f"{glob.escape(args.output.stem)}.seen*.jsonl", args.output.with_suffix(".seen.jsonl")
    journals = from_first(sorted(args.output.parent.glob(pattern)))
    results = to_first(check(args, list(share(list(dict.fromkeys(paths)))), journals))
    others = [path for path in args.output.parent.glob(pattern) if path != journal] if results else []
    if others:
        rows = [[path, *found] for path, found in read_seen([journal, *others]).items()]
        write_text(journal, "".join(json.dumps(row) + "\n" for row in rows))
        for path in others:
            path.unlink()
    return {path: verdict for result in results for path, verdict in result.items()}


def main(argv: list[str] | None = None) -> None:
    """Check a list; print the counts. Raises RunError if none of its videos can be read."""
    args = get_args(argv)
    lines = read_list(args.list)
    paths = [os.path.join(args.data_root, line.name) for line in lines]
    verdicts = check_together(args, paths)
    if not verdicts:
        return
    found = [verdicts[path] for path in paths]
    good = [line for line, verdict in zip(lines, found) if not verdict.bad and not verdict.wrong]
    reasons = {
        ".bad.tsv": [verdict.bad for verdict in found],
        ".wrong.tsv": [verdict.wrong for verdict in found],
        ".slow.tsv": ["; ".join(verdict.slow) for verdict in found],
    }
    bad, wrong, slow = (sum(map(bool, column)) for column in reasons.values())
    print(f"{len(lines)} videos: {len(good)} good; {wrong} read wrongly; {bad} bad; {slow} slow to load")
    for suffix, column in reasons.items():
        rows = [(str(n), paths[n - 1], reason, REMEDIES[suffix]) for n, reason in enumerate(column, 1) if reason]
        write_table(args.output.with_suffix(suffix), ("video", "path", "reason", "remedy"), rows)
        if rows:
            print(f"{args.output.with_suffix(suffix)}: the first: {rows[0][1]}: {rows[0][2]}")
    if wrong or slow:
        print(f"to re-encode them: python scripts/data/resize_videos.py {args.list} --output FOLDER")
    if not good:
        raise RunError(f"{args.list}: not one of its videos can be read; relative paths start from --data_root")
    write_list(args.output, good)
    print(f"{args.output}: {len(good)} videos")


if __name__ == "__main__":
    run_main(main)
