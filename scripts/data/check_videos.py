"""Which videos of a list can be read, which of them wrongly, and which slowly.

    python scripts/data/check_videos.py lists/train.csv --output lists/train.good.csv
    python scripts/data/check_videos.py lists/train.csv --output lists/train.good.csv --full --workers 32

Each video is decoded from its start to its end, and frames that the reader finds by their numbers, at random places
(--full: all of them), are compared with that sequence. Written beside --output (here ``lists/train.good``): the list of
the videos that are read right, ``.bad.tsv`` with line, path and reason of those that cannot be read, ``.wrong.tsv`` of
those whose frames are others, ``.slow.tsv`` of those that load slowly. A video that hangs the decoder or kills its
process is a bad one. The same command, started again, looks only at what it has not seen or what has changed
(``.seen.jsonl``).
"""

import argparse
import glob
import json
import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from data_tools import Line, RunError, read_list, write_list, write_table, write_text
from processes import Team, in_processes

from shards import problem_of, status
from utils import run_main
from video_check import slow_reasons, wrong_frames
from video_reader import READERS, VideoError

PLACES = 16  # frames of each video that are compared
REMEDIES = {
    ".bad.tsv": "",
    ".wrong.tsv": "scripts/data/resize_videos.py writes a file that every reader reads right",
    ".slow.tsv": "make it fast with scripts/data/resize_videos.py",
}


class State(NamedTuple):
    """What must be the same for an earlier look at a file to count."""

    size: int
    changed: int
    full: bool  # every frame was compared
    input_size: int
    reader: str


class Verdict(NamedTuple):
    """Why a video cannot be read ("": it can), which frames are wrong ("": none), and why it loads slowly."""

    bad: str
    wrong: str = ""
    slow: tuple[str, ...] = ()


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("list", help="list with lines `path label`")
    parser.add_argument("--output", required=True, help="the list of the readable videos, a .csv file to write")
    parser.add_argument("--data_root", default="", help="folder that relative paths in the list start from")
    parser.add_argument("--full", action="store_true", help=f"compare all frames of each video, not {PLACES} alone")
    parser.add_argument("--reader", choices=READERS, default="pyav", help="the reader to be used (default pyav)")
    parser.add_argument("--input_size", type=int, default=224, help="side of the clips to be made (default 224 pixels)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="processes (default: one for each core)")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one video (default 120)")
    args = parser.parse_args(argv)
    if args.workers < 1 or args.timeout <= 0:
        parser.error("--workers and --timeout must be positive")
    if Path(args.output).suffix != ".csv" or Path(args.output).resolve() == Path(args.list).resolve():
        parser.error("--output must be a .csv file other than the list")
    return args


def state_of(path: str, *settings: Any) -> State | None:
    """The state of a file, None if there is none."""
    try:
        return State(*status(path), *settings)
    except OSError:
        return None


def look(path: str, full: bool, size: int, reader: str) -> Verdict:
    """Compare frames of a video with FFmpeg's sequence, and look for what makes it slow."""
    try:
        wrong = wrong_frames(path, np.random.default_rng(0), reader, 0 if full else PLACES)
        return Verdict("", wrong, tuple(slow_reasons(path, size)))
    except VideoError as error:
        return Verdict(str(error))


def read_seen(journals: Iterable[Path]) -> dict[str, tuple[State, Verdict]]:
    """What earlier runs found; a line that was cut off by their end is dropped."""
    seen = {}
    for line in (line for path in journals for line in path.read_text().splitlines()):
        try:
            name, state, verdict = json.loads(line)
        except json.JSONDecodeError:
            continue
        seen[name] = State(*state), Verdict(*verdict)
    return seen


def journals_of(output: Path) -> list[Path]:
    """What all processes of all runs have found, a JSON list a line."""
    return sorted(output.parent.glob(f"{glob.escape(output.stem)}.seen*.jsonl"))


def check(args: argparse.Namespace, paths: list[str], team: Team) -> dict[str, Verdict]:
    """The verdict on each path of this process's share.

    It is taken from the journals where they are up to date, and added to the one of this process where they are not.
    """
    output = Path(args.output)
    seen = read_seen(journals_of(output))
    settings = args.full, args.input_size, args.reader
    states = {path: state_of(path, *settings) for path in team.share(dict.fromkeys(paths))}
    verdicts = {path: seen[path][1] for path in states if path in seen and seen[path][0] == states[path]}
    verdicts |= {path: Verdict(problem_of(path)) for path, state in states.items() if state is None}
    todo = [path for path in states if path not in verdicts]
    with open(output.with_suffix(f".seen.{team.rank}.jsonl" if team.rank else ".seen.jsonl"), "a") as file:
        file.write("\n" * bool(seen))  # the last line may have been cut off
        work = partial(look, full=args.full, size=args.input_size, reader=args.reader)
        for path, verdict, lost in in_processes(work, todo, args.workers, args.timeout, "videos", team):
            verdicts[path] = verdict or Verdict(lost)
            if verdict:  # a lost process may have been a matter of time or memory
                file.write(json.dumps([path, states[path], verdict]) + "\n")
                file.flush()
    return verdicts


def check_together(args: argparse.Namespace, paths: list[str]) -> dict[str, Verdict]:
    """The verdict on each path, in the first process; nothing in the others. Their journals become one."""
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    team = Team(output.with_name(f".{output.stem}.team"))
    team.begin()
    results = team.gather(check(args, paths, team))
    journals = journals_of(output) if results else []
    if len(journals) > 1:
        rows = [[path, *found] for path, found in read_seen(journals).items()]
        write_text(output.with_suffix(".seen.jsonl"), "".join(json.dumps(row) + "\n" for row in rows))
        for path in journals:
            if path != output.with_suffix(".seen.jsonl"):
                path.unlink()
    return {path: Verdict(*verdict) for result in results for path, verdict in result.items()}


def main(argv: list[str] | None = None) -> int:
    """Check a list; print the counts. Exit code 1 if not one of its videos can be read."""
    args = get_args(argv)
    lines, output = read_list(args.list), Path(args.output)
    paths = [os.path.join(args.data_root, line.name) for line in lines]
    if not (verdicts := check_together(args, paths)):
        return 0
    good: list[Line] = []
    tables: dict[str, list[tuple[str, ...]]] = {suffix: [] for suffix in REMEDIES}
    for number, (line, path) in enumerate(zip(lines, paths), 1):
        verdict = verdicts[path]
        found = {".bad.tsv": verdict.bad, ".wrong.tsv": verdict.wrong, ".slow.tsv": "; ".join(verdict.slow)}
        for suffix, reason in found.items():
            if reason:
                tables[suffix].append((str(number), path, reason, REMEDIES[suffix]))
        if not verdict.bad and not verdict.wrong:
            good.append(line)
    bad, wrong, slow = (len(rows) for rows in tables.values())
    print(f"{len(lines)} videos: {len(good)} good; {wrong} read wrongly; {bad} bad; {slow} slow to load")
    for suffix, rows in tables.items():
        write_table(output.with_suffix(suffix), ("video", "path", "reason", "remedy"), rows)
        if rows:
            print(f"{output.with_suffix(suffix)}: the first: {rows[0][1]}: {rows[0][2]}")
    if wrong or slow:
        print(f"to mend them: python scripts/data/resize_videos.py {args.list} --output FOLDER")
    if not good:
        raise RunError(f"{args.list}: not one of its videos can be read; relative paths start from --data_root")
    write_list(output, good)
    print(f"{output}: {len(good)} videos")
    return 0


if __name__ == "__main__":
    run_main(main)
