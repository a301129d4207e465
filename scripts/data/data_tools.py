"""Shared by the programs of this folder: options, lists, and files that are either complete or absent.

A run can be killed at any moment. Results are written elsewhere and renamed when they are complete, so that the same
command, started again, finds only complete results and continues from there.
"""

import argparse
import fcntl
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lists
from shards import find, split
from utils import RunError, rank, user_errors, write_atomically

LOCK_WAIT, POLL = 20.0, 0.05  # seconds


class Unusable(Exception):
    """A file that cannot be used; the message is the reason, without the path."""


# Options --------------------------------------------------------------------------------------------------------


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the description as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be an integer of at least 1")
    return int(text)


def add_work_options(parser: argparse.ArgumentParser, item: str, timeout: int) -> None:
    """Add --workers and --timeout (seconds for an item), for in_processes."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=positive, default=cores, help="processes (default: one for each core)")
    parser.add_argument("--timeout", type=positive, default=timeout, help=f"seconds for one {item} (default {timeout})")


def list_parser(description: str | None, item: str, timeout: int) -> argparse.ArgumentParser:
    """Parser of a program that writes new files from the videos of lists."""
    parser = new_parser(description)
    parser.add_argument("lists", nargs="+", help="lists with lines `path label`")
    parser.add_argument("--output", required=True, type=Path, help="folder to write to")
    parser.add_argument("--data_root", default="", help="folder that relative paths in the lists start from")
    parser.add_argument("--relative", action="store_true", help="write relative paths, for use with --data_root")
    add_work_options(parser, item, timeout)
    return parser


# Lists ----------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of a list: the path as it is written there, and the text of the label."""

    name: str
    label: str


Problem = tuple[str, str, str, str]  # list, kind, name, detail


@dataclass
class Found:
    """New lists: lines and number of wanted videos by list file, problems, and names of the classes if known."""

    lines: dict[str, list[Line]] = field(default_factory=dict)
    wanted: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)


def read_list(path: str) -> list[Line]:
    """Read a list of videos with labels of any kind. Raises RunError if it is none."""
    with user_errors():
        videos = lists.read_list(path, lists.label_text)
    return [Line(os.fsdecode(name), os.fsdecode(label)) for name, label in zip(videos.paths, videos.labels)]


def read_lists(paths: Sequence[str]) -> dict[str, list[Line]]:
    """Read lists whose names differ, so that new lists can have the same names; by path. Raises RunError."""
    name, count = Counter(Path(path).name for path in paths).most_common(1)[0]
    if count > 1:
        raise RunError(f"two lists are called {name}")
    return {path: read_list(path) for path in paths}


def read_text(path: str | Path) -> str:
    """Read a text file, with or without a byte order mark. Raises RunError if it cannot be read."""
    with user_errors():
        return lists.read_text(path)


def read_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yield place (for errors) and text of each line that is not blank, without surrounding spaces."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def fits_a_list(path: str) -> bool:
    """Return True if a line of a list can hold this path: UTF-8, no line breaks, no spaces at its ends."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return len(path.splitlines()) == 1 and path == path.strip()


def write_list(path: Path, lines: Sequence[Line]) -> None:
    """Write a list."""
    write_text(path, "".join(f"{name} {label}\n" for name, label in lines))


def write_lists(args: argparse.Namespace, lists: dict[str, list[Line]], places: dict[str, str]) -> None:
    """Write lists with the new paths to --output, with the classes.txt beside the old ones, and print their lengths.

    `places` has the new path of each source; lines without one are left out. Raises RunError if a list would be empty.
    """
    for path, lines in lists.items():
        new, sources = args.output / Path(path).name, [os.path.join(args.data_root, line.name) for line in lines]
        kept = [Line(places[source], line.label) for source, line in zip(sources, lines) if source in places]
        if not kept:
            raise RunError(f"{new}: not written, all of its videos failed (see {args.output}/failed.tsv)")
        write_list(new, kept)
        print(f"{new}: {len(kept)} of {len(lines)} videos")
        classes = Path(path).parent / "classes.txt"
        if classes.exists():
            write_text(args.output / "classes.txt", read_text(classes))


def common_folder(sources: Sequence[str]) -> str:
    """The deepest folder that contains all sources."""
    return os.path.commonpath([os.path.dirname(os.path.abspath(source)) for source in sources])


def without_suffixes(paths: Sequence[str]) -> list[str]:
    """Paths without their suffixes; paths that differ in the suffix alone keep it, so that results do not collide."""
    stems = [os.path.splitext(path)[0] for path in paths]
    counts = Counter(dict(zip(paths, stems)).values())
    return [stem if counts[stem] == 1 else path for path, stem in zip(paths, stems)]


# Files that are complete or absent ------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode(errors="surrogateescape")))


def write_table(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write rows separated by tabs under a header; without rows, remove the file."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    clean = [[re.sub(r"\s+", " ", str(cell)) for cell in row] for row in (header, *rows)]
    write_text(path, "".join("\t".join(row) + "\n" for row in clean))


def put_in_place(unfinished: Path, path: Path) -> None:
    """Flush a complete file to the disk and give it its name."""
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(unfinished, path)


def status(path: str) -> tuple[int, int]:
    """Return the size in bytes, and the modification time of file or shard in nanoseconds. Raises OSError."""
    parts = split(path)
    result = os.stat(parts[0] if parts else path)
    return (find(*parts).size if parts else result.st_size), result.st_mtime_ns


def is_made(path: Path, source: str) -> bool:
    """Return True if a result exists and is newer than its source, or the source is gone."""
    if not path.exists():
        return False
    try:
        return path.stat().st_mtime_ns >= status(source)[1]
    except OSError:
        return True


def take_lock(lock: IO, folder: Path) -> None:
    """Lock a file, which the workers of a killed run hold for a moment longer. Raises RunError after LOCK_WAIT."""
    for _ in range(max(1, round(LOCK_WAIT / POLL))):
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(POLL)
    raise RunError(f"{folder}: another run is writing to this folder")


@contextmanager
def output_folder(path: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """Lock the folder that a run writes to; yields an empty folder in it for unfinished files.

    Each process of the run has its own lock and unfinished files. `settings`, the options that the results depend on,
    are kept in ``settings.json``. Raises RunError if another run is writing there, or with other settings.
    """
    path.mkdir(parents=True, exist_ok=True)
    suffix = f".{rank()}" if rank() else ""
    with open(path / f".lock{suffix}", "w") as lock:
        take_lock(lock, path)
        record = path / "settings.json"
        made = json.loads(record.read_text()) if record.exists() else settings
        if changed := [name for name in settings if made.get(name) != settings[name]]:
            name, was = changed[0], made.get(changed[0])
            raise RunError(f"{path} was made with --{name} {was}, not {settings[name]}: give that, or another --output")
        if rank() == 0:
            write_text(record, json.dumps(settings, indent=1) + "\n")
        unfinished = path / f".unfinished{suffix}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        for left in [unfinished] if rank() else path.glob(".unfinished*"):  # the first process ends last
            shutil.rmtree(left, ignore_errors=True)
        for other in () if rank() else path.glob(".lock.*"):
            other.unlink(missing_ok=True)
