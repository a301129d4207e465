"""Work in several processes of a node, and on several nodes, for the programs of this folder.

A process that hangs or dies costs what it worked on alone. Nodes meet by files in a folder that all of them see.
"""

import ctypes
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from data_tools import RunError, Unusable, write_text
from tqdm import tqdm

T = TypeVar("T")
FORK = multiprocessing.get_context("fork")
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl
BEAT, PATIENCE, POLL = 10.0, 300.0, 0.3  # seconds: between signs of life, without one, between looks at a file
tqdm.monitor_interval = 0  # its thread would be running while processes are forked


# Processes of a node --------------------------------------------------------------------------------------------------


def serve(
    function: Callable[[Any], Any],
    pipe: multiprocessing.connection.Connection,
    parents_end: multiprocessing.connection.Connection,
) -> None:
    """What a worker does: call the function for each item that comes; end with the program, however that ends."""
    parents_end.close()
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGUSR1):  # to the whole process group: the program's affair
        signal.signal(number, signal.SIG_IGN)
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
    function: Callable[[Any], Any], items: Sequence[Any], workers: int, timeout: float, title: str, team: "Team"
) -> Iterator[tuple[Any, Any, str]]:
    """Print a progress bar and give (item, result, "") or (item, None, reason), in the order in which they are done.

    An item that raises Unusable, takes longer than `timeout` seconds or kills its process costs nothing but itself.
    """
    todo = deque(items)
    crew = [Worker(function) for _ in range(min(workers, len(todo)))]
    busy: set[Worker] = set()
    try:
        with tqdm(total=len(todo), desc=title, disable=team.rank > 0 or None, smoothing=0.05) as bar:
            while todo or busy:
                for worker in [worker for worker in crew if worker not in busy][: len(todo)]:
                    worker.give(todo.popleft(), timeout)
                    busy.add(worker)
                multiprocessing.connection.wait([worker.pipe for worker in busy], timeout=1)
                team.beat()
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


# Nodes ----------------------------------------------------------------------------------------------------------


def process_place() -> tuple[int, int]:
    """Index of this process among those that torchrun or srun started, and their number.

    By the variables that utils.init_distributed reads: torchrun's win over Slurm's, which count in an srun step alone.
    """
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"])
    return int(env.get("RANK", 0)), int(env.get("WORLD_SIZE", 1))


class Team:
    """The processes of a run, which may be on several nodes and meet by files in a folder that all of them see.

    Each works on its share. The first one lets the others begin, takes their results and writes what is made of all.
    A ticket, drawn anew by each process, tells its files from those of an earlier run, which may have ended anywhere.
    While it works or waits, a process gives signs of life; who waits for one that gives none any more ends.

    Args:
        folder: for their files alone; not made for a single process.
    """

    def __init__(self, folder: Path):
        self.rank, self.world = process_place()
        self.folder, self.ticket = folder, uuid.uuid4().hex
        self.tickets: dict[int, str] = {}  # of the processes that the first one has let begin
        self.beats, self.next_beat, self.next_look = 0, 0.0, 0.0

    def write(self, kind: str, value: Any) -> None:
        """Write a file of this process."""
        write_text(self.folder / f"{kind}.{self.rank}", json.dumps(value))

    def read(self, kind: str, rank: int) -> Any:
        """A file of a process; None if there is none."""
        try:
            return json.loads((self.folder / f"{kind}.{rank}").read_text())
        except FileNotFoundError:
            return None

    def beat(self) -> None:
        """Give a sign of life, if it is time for one; the first process lets those begin that have come."""
        now = time.monotonic()
        if self.world == 1 or now < self.next_look:
            return
        self.next_look = now + POLL
        if now >= self.next_beat:
            self.beats, self.next_beat = self.beats + 1, now + BEAT
            self.write("alive", self.beats)
        if self.rank == 0:
            come = {rank: ticket for rank in range(1, self.world) if (ticket := self.read("come", rank))}
            if come:
                self.tickets |= come
                self.write("begin", list(self.tickets.values()))
            for rank in come:
                (self.folder / f"come.{rank}").unlink()

    def begin(self) -> None:
        """Wait until the first process has come here, which is when it has locked and prepared what all of them need.

        Raises:
            RunError: it gives no sign of life.
        """
        if self.rank > 0:
            self.write("come", self.ticket)
            self.wait(0, lambda: self.ticket in (self.read("begin", 0) or ()))

    def share(self, items: Iterable[T]) -> Iterator[T]:
        """Every world-th of these items, beginning with that of this process's rank."""
        for item in islice(items, self.rank, None, self.world):
            self.beat()
            yield item

    def gather(self, result: Any) -> list[Any]:
        """The results of all processes, by rank, in the first one; nothing in the others, which are done then.

        Args:
            result: what JSON can hold.
        Raises:
            RunError: a process gives no sign of life.
        """
        if self.rank > 0:
            self.write("result", [self.ticket, result])
            return []
        results = [result]
        for rank in range(1, self.world):

            def has_come(rank: int = rank) -> bool:
                found = self.read("result", rank)
                return found is not None and found[0] == self.tickets.get(rank)

            self.wait(rank, has_come)
            results.append(self.read("result", rank)[1])
        shutil.rmtree(self.folder, ignore_errors=True)
        return results

    def wait(self, rank: int, is_there: Callable[[], bool]) -> None:
        """Wait for something that a process does. Raises RunError."""
        said, heard = None, time.monotonic()
        while not is_there():
            self.beat()
            if (now_said := self.read("alive", rank)) != said:
                said, heard = now_said, time.monotonic()
            if time.monotonic() > heard + PATIENCE:
                raise RunError(
                    f"process {rank} of {self.world} has ended, or hangs: no sign of life for {PATIENCE:g} s in "
                    f"{self.folder}; what is done stays: start the same command again"
                )
            time.sleep(POLL)
