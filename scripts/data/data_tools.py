"""What the programs of this folder share: lists, and files that are whole or not there.

A run can be killed at any moment. Results are written elsewhere and moved into place when they are complete, so that
the same command, started again, finds only whole ones and goes on from there.
"""

import argparse
import fcntl
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lists
from shards import status
from utils import RunError, user_errors

LOCK_WAIT = 20.0  # seconds


class Unusable(Exception):
    """A file that cannot be used; the message is the reason, without the path."""


# Lists ----------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of a list: the path as it is written there, and the label's text."""

    name: str
    label: str


def read_list(path: str) -> list[Line]:
    """The lines of a list of videos, whatever kind the labels are.

    Raises:
        RunError: no such file, no line, or one that is not ``path label``, by its number.
    """
    with user_errors():
        videos = lists.read_list(path, lists.label_text)
    return [Line(os.fsdecode(name), os.fsdecode(label)) for name, label in zip(videos.paths, videos.labels)]


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line that is not blank, without the spaces around it."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def read_text(path: str | Path) -> str:
    """A text file, with or without a byte order mark.

    Raises:
        RunError: it cannot be read.
    """
    with user_errors():
        return lists.read_text(path)


def fits_a_list(path: str) -> bool:
    """Whether a line of a list can hold this path: no line breaks, no spaces at its ends, UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return len(path.splitlines()) == 1 and path == path.strip()


def write_list(path: Path, lines: Sequence[Line]) -> None:
    """Write a list, all of it or nothing."""
    write_text(path, "".join(f"{name} {label}\n" for name, label in lines))


def names_differ(parser: argparse.ArgumentParser, paths: Sequence[str]) -> None:
    """End with an error if two lists have the same name, and so would the new ones."""
    name, count = Counter(Path(path).name for path in paths).most_common(1)[0]
    if count > 1:
        parser.error(f"two lists are called {name}")


def common_folder(sources: list[str]) -> str:
    """The deepest folder that all sources lie below."""
    return os.path.commonpath([os.path.dirname(os.path.abspath(source)) for source in sources])


def write_lists(output: Path, lists: dict[str, list[Line]], data_root: str, places: dict[str, str]) -> None:
    """Print how many videos each new list has, and write them to a folder, with the classes.txt beside the old ones.

    Args:
        lists: by path.
        places: the new path of each source; lines without one are left out.
    Raises:
        RunError: a list would be empty.
    """
    for path, lines in lists.items():
        new, named = (
            output / Path(path).name,
            [(places.get(os.path.join(data_root, line.name)), line) for line in lines],
        )
        kept = [Line(place, line.label) for place, line in named if place]
        if not kept:
            raise RunError(f"{new}: not written, all of its videos failed (see {output}/failed.tsv)")
        write_list(new, kept)
        print(f"{new}: {len(kept)} of {len(lines)} videos")
        classes = Path(path).parent / "classes.txt"
        if classes.exists():
            write_text(output / "classes.txt", read_text(classes))


# Files that are whole or not there ------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a text file, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.unfinished")  # other nodes may write it too
    unfinished.write_text(text, encoding="utf-8", errors="surrogateescape")
    put_in_place(unfinished, path)


def put_in_place(unfinished: Path, path: Path) -> None:
    """Give a complete file its name, once it is on the disk."""
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(unfinished, path)


def write_table(path: Path, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write rows separated by tabs under a line of heads; without rows there is no file."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    clean = [[re.sub(r"\s+", " ", str(cell)) for cell in row] for row in (heads, *rows)]
    write_text(path, "".join("\t".join(row) + "\n" for row in clean))


def take_lock(lock: IO, folder: Path, seconds: float) -> None:
    """Lock a file, which workers share; those of a run that was killed may need a moment to end.

    Raises:
        RunError: it is still locked after some seconds.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > end:
                raise RunError(f"{folder}: another run is writing to this folder") from error
            time.sleep(0.05)


@contextmanager
def output_folder(path: Path, settings: dict[str, Any], rank: int = 0) -> Iterator[Path]:
    """The folder that a run writes to, for this run alone; gives a folder in it for unfinished files, empty.

    Args:
        settings: what the results depend on; kept in ``settings.json``.
        rank: of this process among those of the run (Team), each of which has unfinished files of its own.
    Raises:
        RunError: another run is at work there, or its results were made with other settings.
    """
    path.mkdir(parents=True, exist_ok=True)
    of_rank = f".{rank}" if rank else ""
    with open(path / f".lock{of_rank}", "w") as lock:
        take_lock(lock, path, LOCK_WAIT)
        record = path / "settings.json"
        made = json.loads(record.read_text()) if record.exists() else settings
        if changed := [name for name in settings if made.get(name) != settings[name]]:
            name, was = changed[0], made.get(changed[0])
            raise RunError(f"{path} was made with --{name} {was}, not {settings[name]}: give that, or another --output")
        write_text(record, json.dumps(settings, indent=1) + "\n")
        unfinished = path / f".unfinished{of_rank}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        for left in [unfinished] if rank else path.glob(".unfinished*"):  # the others have ended before the first
            shutil.rmtree(left, ignore_errors=True)
        for other in () if rank else path.glob(".lock.*"):
            other.unlink(missing_ok=True)


def is_made(path: Path, source: str) -> bool:
    """Whether there is a result at `path`, made after its source was last changed, or whose source is gone."""
    if not path.exists():
        return False
    try:
        return path.stat().st_mtime_ns >= status(source)[1]
    except OSError:
        return True


def without_suffixes(paths: Sequence[str]) -> list[str]:
    """Paths without their suffixes; those that differ in the suffix alone keep it, so that results do not collide."""
    stems = [os.path.splitext(path)[0] for path in paths]
    counts = Counter(dict(zip(paths, stems)).values())
    return [stem if counts[stem] == 1 else path for path, stem in zip(paths, stems)]
