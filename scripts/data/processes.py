"""Work in several processes of a node (in_processes), and on several nodes, for the programs of this folder.

A process that hangs or dies costs only the item it works on. Nodes are connected as in training, by torchrun or srun.
"""

import argparse
import ctypes
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from data_tools import Unusable, output_folder
from tqdm import tqdm

from utils import EXIT_REQUEUE, STOP_SIGNALS, init_distributed, keep_alive, leave_on_signal, rank, world_size

T = TypeVar("T")
FORK = multiprocessing.get_context("fork")
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux' prctl
PATIENCE = timedelta(days=7)  # for processes whose part takes longer
tqdm.monitor_interval = 0  # its thread would be running while processes are forked
tqdm.set_lock(threading.RLock())  # its own is shared with forked processes, and stays locked if one of them is killed


# Processes of a node --------------------------------------------------------------------------------------------


def serve(
    function: Callable[[Any], Any],
    pipe: multiprocessing.connection.Connection,
    parents_end: multiprocessing.connection.Connection,
) -> None:
    """Loop of a worker: call the function for each item received, until the program ends."""
    parents_end.close()
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGUSR1):  # sent to the whole process group; the program handles them
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


def start(function: Callable[[Any], Any]) -> tuple[multiprocessing.connection.Connection, Any]:
    """Start a worker; returns its pipe and process."""
    pipe, theirs = FORK.Pipe()
    process = FORK.Process(target=serve, args=(function, theirs, pipe), daemon=True)
    process.start()
    theirs.close()
    return pipe, process


def receive(pipe: multiprocessing.connection.Connection, process: Any) -> tuple[Any, str]:
    """(result, "") or (None, reason) of a worker that has sent one, or died."""
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        return None, f"the process that read it died (exit code {process.exitcode})"


def end(pipe: multiprocessing.connection.Connection, process: Any) -> None:
    """Kill a worker."""
    process.kill()
    process.join()
    pipe.close()


def in_processes(
    function: Callable[[Any], Any], items: Sequence[T], workers: int, timeout: float, title: str
) -> Iterator[tuple[T, Any, str]]:
    """Yield (item, result, "") or (item, None, reason) in the order of completion, showing a progress bar.

    An item fails if the function raises Unusable, takes longer than `timeout` seconds, or kills its process.
    """
    todo = deque(items)
    crew = dict(start(function) for _ in range(min(workers, len(todo))))  # processes by their pipes
    busy: dict[Any, tuple[T, float]] = {}  # item and deadline, by pipe
    try:
        with tqdm(total=len(todo), desc=title, disable=rank() > 0 or None, smoothing=0.05) as bar:
            while todo or busy:
                for pipe in [pipe for pipe in crew if pipe not in busy][: len(todo)]:
                    busy[pipe] = todo.popleft(), time.monotonic() + timeout
                    pipe.send(busy[pipe][0])
                ready = multiprocessing.connection.wait(list(busy), timeout=1)
                for pipe in [pipe for pipe in busy if pipe in ready or time.monotonic() > busy[pipe][1]]:
                    item, _ = busy.pop(pipe)
                    outcome = receive(pipe, crew[pipe]) if pipe in ready else (None, "no answer in time (--timeout)")
                    if pipe not in ready or not crew[pipe].is_alive():
                        end(pipe, crew.pop(pipe))
                        crew |= [start(function)]
                    bar.update()
                    yield item, *outcome
    finally:
        for pipe, process in crew.items():
            end(pipe, process)


# Nodes ----------------------------------------------------------------------------------------------------------


def connect() -> None:
    """Connect to the other processes of the run, if torchrun or srun started any. Raises RunError."""
    if world_size() == 1:
        init_distributed("cpu", timeout_minutes=5)  # for all to start


@functools.cache
def patient_group() -> Any:
    """All processes; the first request must be made by all of them."""
    return keep_alive(dist.new_group(backend="gloo", timeout=PATIENCE))


def wait_for(operation: Callable[[], None]) -> None:
    """Run a collective operation in a thread, so that signals to stop end the program while it waits."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: os._exit(EXIT_REQUEUE))
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(operation)
    leave_on_signal()
    done.result()  # raises RuntimeError if another process was lost


def from_first(value: T) -> T:
    """Wait for the first process and return its value."""
    if world_size() == 1:
        return value
    box = [value]
    wait_for(lambda: dist.broadcast_object_list(box, group=patient_group()))
    return box[0]


def to_first(value: T) -> list[T]:
    """Values of all processes by rank, in the first one; an empty list in the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size() if rank() == 0 else []
    wait_for(lambda: dist.gather_object(value, values or None, group=patient_group()))
    return values


def share(items: Sequence[T]) -> Sequence[T]:
    """The items of this process: every world-th, beginning with that of its rank."""
    return items[rank() :: world_size()]


def make_all(
    args: argparse.Namespace,
    settings: dict[str, Any],
    jobs: Callable[[], list[T]],
    make: Callable[[T, Path], Any],
    title: str,
) -> list[tuple[T, Any, str]]:
    """Do all jobs in the processes of all nodes, in the locked output_folder of `args` and `settings`.

    Args:
        jobs: called in the first process, once the folder is locked.
        make: called with a job and a folder for unfinished files; raises Unusable.
    Returns:
        (job, result, "") or (job, None, reason) of each; an empty list in all processes but the first.
    """
    connect()
    with output_folder(args.output, settings) as unfinished:
        mine = share(from_first(jobs() if rank() == 0 else []))
        work = functools.partial(make, unfinished=unfinished)
        outcomes = list(in_processes(work, mine, args.workers, args.timeout, title))
        return [outcome for part in to_first(outcomes) for outcome in part]
