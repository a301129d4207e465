"""What the programs of this folder share: lists, work in several processes, and files that are whole or not there.

A run can be killed at any moment. Results are written elsewhere and moved into place when they are complete, so that
the same command, started again, finds only whole ones and goes on from there.
"""

import ctypes
import fcntl
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lists
from utils import RunError, user_errors

FORK = multiprocessing.get_context("fork")
LOCK_WAIT = 20.0  # seconds
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl
tqdm.monitor_interval = 0  # its thread would be running while processes are forked


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


# Files that are whole or not there ------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a text file, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
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
def output_folder(path: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """The folder that a run writes to, for this run alone; gives a folder in it for unfinished files, empty.

    Args:
        settings: what the results depend on; kept in ``settings.json``.
    Raises:
        RunError: another run is at work there, or its results were made with other settings.
    """
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "w") as lock:
        take_lock(lock, path, LOCK_WAIT)
        record = path / "settings.json"
        made = json.loads(record.read_text()) if record.exists() else settings
        if changed := [name for name in settings if made.get(name) != settings[name]]:
            name, was = changed[0], made.get(changed[0])
            raise RunError(f"{path} was made with --{name} {was}, not {settings[name]}: give that, or another --output")
        write_text(record, json.dumps(settings, indent=1) + "\n")
        unfinished = path / ".unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        shutil.rmtree(unfinished)


def is_made(path: Path, source: str) -> bool:
    """Whether there is a result at `path`, made after its source was last changed, or whose source is gone."""
    if not path.exists():
        return False
    return not os.path.exists(source) or os.stat(path).st_mtime >= os.stat(source).st_mtime


def without_suffixes(paths: Sequence[str]) -> list[str]:
    """Paths without their suffixes; those that differ in the suffix alone keep it, so that results do not collide."""
    stems = [os.path.splitext(path)[0] for path in paths]
    counts = Counter(dict(zip(paths, stems)).values())
    return [stem if counts[stem] == 1 else path for path, stem in zip(paths, stems)]


# Processes ------------------------------------------------------------------------------------------------------


def serve(
    function: Callable[[Any], Any],
    pipe: multiprocessing.connection.Connection,
    parents_end: multiprocessing.connection.Connection,
) -> None:
    """What a worker does: call the function for each item that comes; end with the program, however that ends."""
    parents_end.close()
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        try:
            item = pipe.recv()
        except EOFError:  # the program ended before prctl was called
            return
        try:
            outcome = function(item), ""
        except Unusable as error:
            outcome = None, str(error)
        pipe.send(outcome)


class Worker:
    """A process that works on one item at a time."""

    def __init__(self, function: Callable[[Any], Any]):
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=serve, args=(function, theirs, self.pipe), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, item: Any, timeout: float) -> None:
        """Have it work on an item."""
        self.item, self.deadline = item, time.monotonic() + timeout
        self.pipe.send(item)

    def take(self) -> tuple[Any, str] | None:
        """Its result and no reason, or None and the reason; None while it has neither."""
        if self.pipe.poll():
            try:
                return self.pipe.recv()
            except (EOFError, ConnectionResetError):
                self.process.join()
                return None, f"the process that read it died (exit code {self.process.exitcode})"
        return (None, "no answer in time (--timeout)") if time.monotonic() > self.deadline else None

    def stop(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def in_processes(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int, timeout: float, title: str
) -> Iterator[tuple[Any, Any, str]]:
    """Print a progress bar and give (item, result, "") or (item, None, reason), in the order in which they are done.

    An item that raises Unusable, takes longer than `timeout` seconds or kills its process costs nothing but itself.
    """
    todo = deque(items)
    crew = [Worker(function) for _ in range(min(workers, len(todo)))]
    busy: set[Worker] = set()
    try:
        with tqdm(total=len(todo), desc=title, disable=None, smoothing=0.05) as bar:
            while todo or busy:
                for worker in [worker for worker in crew if worker not in busy][: len(todo)]:
                    worker.give(todo.popleft(), timeout)
                    busy.add(worker)
                multiprocessing.connection.wait([worker.pipe for worker in busy], timeout=1)
                for worker in list(busy):
                    outcome = worker.take()
                    if outcome is None:
                        continue
                    busy.remove(worker)
                    if outcome[0] is None and (not worker.process.is_alive() or time.monotonic() > worker.deadline):
                        worker.stop()
                        crew[crew.index(worker)] = Worker(function)
                    bar.update()
                    yield worker.item, *outcome
    finally:
        for worker in crew:
            worker.stop()
