"""Helpers for processes, logging, seeds, signals and files; each works unchanged in a single process."""

import ctypes
import datetime
import errno
import functools
import logging
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
EXIT_REQUEUE = 85  # the run was told to stop and has saved a checkpoint: start it again (scripts/slurm)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
PATIENCE = 5.0  # seconds that the first process waits for others that end with an error as well

logger = logging.getLogger("smile")
shared_store: dist.Store | None = None  # shared by the processes; set by init_distributed


class RunError(Exception):
    """An error that the user can fix; shown as one line, without a traceback."""


@contextmanager
def user_errors(prefix: str = "") -> Iterator[None]:
    """Turn ValueErrors and OSErrors into RunErrors.

    A leaf's ValueError begins with the name of its parameter; the prefix ``--`` or ``--clip_`` makes a flag of it.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise RunError(prefix * isinstance(error, ValueError) + str(error)) from error


def first_line(error: Exception) -> str:
    """Return the first line of a message, with the next if it is a heading; without a message the error's name."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    return " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")])[:300]


def last_line(error: Exception) -> str:
    """Return the last line of a message, which may follow a worker's traceback; without a message the error's name."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def run_main(function: Any, *args: Any) -> None:
    """Call a program's main function and exit with its code.

    The code is 1, after a one-line message, on RunError, if a file cannot be read or written, or if a process was lost;
    EXIT_REQUEUE if told to stop.
    """
    leave_on_signal()
    try:
        code = function(*args)
    except (RunError, OSError) as error:
        problem = str(error)
        if isinstance(error, OSError):
            if not error.filename and error.errno not in DISK_ERRORS:
                raise
            problem = f"{error.filename or 'a file could not be written'}: {error.strerror}"
        if should_print(problem):
            print(f"error: {problem}", file=sys.stderr, flush=True)
        sys.exit(1)
    except RuntimeError as error:
        reason = first_line(error)[-160:]
        if "DataLoader worker" in str(error):  # raised by torch's signal handler, wherever the program was
            problem = f"the data loader failed ({reason}); if memory ran out, use fewer --num_workers"
        elif isinstance(error, dist.DistError) or "gloo/transport" in str(error):
            problem = f"process {rank()} lost its connection to another process; see that one's error ({reason})"
        else:
            raise
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(1)
    finally:
        end_workers()
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(code or 0)


def should_print(message: str) -> bool:
    """Return whether this process prints an error message: of those that end with the same one, the first does."""
    if shared_store is None:
        return True
    try:
        first = shared_store.add(f"said: {message}", 1) == 1
        ended, patience = shared_store.add("ended", 1), time.monotonic() + PATIENCE
        while rank() == 0 and ended < world_size() and time.monotonic() < patience:  # it may host the store
            time.sleep(0.05)
            ended = shared_store.add("ended", 0)
    except RuntimeError:  # the process that hosted the store has ended
        return True
    return first


def leave_on_signal() -> None:
    """Let a signal end the program at once with EXIT_REQUEUE, while there is nothing to save (see Control)."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: sys.exit(EXIT_REQUEUE))


def end_workers() -> None:
    """Kill this process's loader workers; Python would wait at exit for one that hangs."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their end as a failure
    for worker in multiprocessing.active_children():
        worker.kill()


class Control:
    """Lets all processes agree, after each step, on whether to stop (SIGTERM, SIGUSR1 or SIGINT) or to save.

    They exchange it on the CPU, one step late, so that no GPU has to wait. A second SIGINT ends the program at once.
    Outside of `listen` … `close` any of the signals ends it at once, with EXIT_REQUEUE.
    """

    def __init__(self):
        self.signal = 0
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._group = cpu_group() if dist.is_initialized() else None

    def listen(self) -> None:
        """Record signals from now on."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number

    def agree(self, save: bool) -> tuple[bool, bool]:
        """Return whether any process was told to stop, and whether any wants to save; with several, one step late."""
        if self._group is None:
            return bool(self.signal), save
        before = self._finish()
        flags = torch.tensor([float(self.signal != 0), float(save)])
        self._pending = (dist.all_reduce(flags, group=self._group, async_op=True), flags)
        return before

    def close(self) -> bool:
        """Stop listening; returns whether any process has been told to stop so far."""
        leave_on_signal()
        self._finish()
        return reduce_sum([float(self.signal != 0)], torch.device("cpu"), self._group)[0] > 0

    def _finish(self) -> tuple[bool, bool]:
        if self._pending is None:
            return False, False
        (work, flags), self._pending = self._pending, None
        work.wait()
        return bool(flags[0]), bool(flags[1])


def rank() -> int:
    """Return the index of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def init_distributed(device: str = "cuda", timeout_minutes: float = 30) -> torch.device:
    """Join the other processes, if torchrun or srun started any; returns this process's device, the CPU without a GPU.

    torchrun's variables win over Slurm's, which are read only inside an srun step. NCCL on GPUs, Gloo on CPUs.
    """
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_STEP_NUM_TASKS"], LOCAL_RANK=env["SLURM_LOCALID"])
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
        if "MASTER_ADDR" not in env:
            command = ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]]
            hosts = subprocess.run(command, capture_output=True, text=True, check=True)
            env["MASTER_ADDR"] = hosts.stdout.split()[0]
    gpu = device.startswith("cuda") and torch.cuda.is_available()
    local = int(env.get("LOCAL_RANK", 0))
    if gpu:
        if local >= (count := torch.cuda.device_count()):
            raise RunError(
                f"local rank {local}, but this node has {count} GPUs: start one process per GPU (lower GPUS)"
            )
        torch.cuda.set_device(local)
        card, built_for = torch.cuda.get_device_properties(local), torch.cuda.get_arch_list()
        if problem := kernel_problem(card.name, (card.major, card.minor), built_for):
            raise RunError(problem)
    if int(env.get("WORLD_SIZE", 1)) > 1:
        timeout = datetime.timedelta(minutes=timeout_minutes)
        store, index, world = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun's store outlives a restart, and with it the addresses of processes that are gone.
        global shared_store
        store = shared_store = dist.PrefixStore(f"attempt {env.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=index, world_size=world, timeout=timeout)
        if not gpu:
            keep_alive(dist.group.WORLD)
    return torch.device("cuda", local) if gpu else torch.device("cpu")


def kernel_problem(gpu: str, capability: tuple[int, int], built_for: list[str]) -> str:
    """Explain why the installed torch cannot compute on a GPU of this compute capability; "" if it can.

    sm_XY is machine code for the major version X from the minor version Y on; compute_XY is compiled at run time for
    all versions from X.Y on (CUDA programming guide, "application compatibility"). Other names are not judged.
    """
    known = [match for name in built_for if (match := re.fullmatch(r"(sm|compute)_(\d+)[af]?", name))]
    versions = [(match[1], divmod(int(match[2]), 10)) for match in known]
    fits = [version <= capability and (kind == "compute" or version[0] == capability[0]) for kind, version in versions]
    if any(fits) or not fits:
        return ""
    older = capability < min(version for _, version in versions)
    return (
        f"{gpu} (compute capability {capability[0]}.{capability[1]}): torch {torch.__version__} has no kernels for it, "
        f"only for {', '.join(built_for)}; install {'what constraints-v100.txt names' if older else 'a newer torch'} "
        "(INSTALL.md), or run with --device cpu"
    )


@functools.cache
def cpu_group() -> Any:
    """Return a Gloo group of all processes, for data in CPU memory; to be called in all of them."""
    return keep_alive(dist.new_group(backend="gloo"))


def keep_alive(group: Any) -> Any:
    """Keep a Gloo group alive until the process ends.

    When one is freed, torch 2.5 waits for its threads while holding Python's lock, which they may need: a deadlock.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    return group


def reduce_sum(values: list[float], device: torch.device, group: dist.ProcessGroup | None = None) -> list[float]:
    """Sum a list of numbers over processes."""
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return total.tolist()


def broadcast(value: Any) -> Any:
    """Return the first process's value in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def seed_everything(*key: int) -> None:
    """Seed the global generators (drop path, Mixup) from a key such as (seed, epoch, chunk).

    Called before every forward pass, so that a resumed run draws the same without saving the generators' states.
    """
    state = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(state)
    np.random.seed(state % 2**32)
    random.seed(state)


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file beside `path`, flush it to disk, and rename it, so that `path` is complete at any moment."""
    draft = path.with_suffix(".tmp")
    try:
        with open(draft, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning once."""
    logger.warning(message)


def setup_logging() -> None:
    """Log to stdout, from the first process only."""
    line = "%(asctime)s %(message)s"
    logging.basicConfig(format=line, datefmt="%H:%M:%S", stream=sys.stdout, level=logging.ERROR, force=True)
    logger.setLevel(logging.INFO if rank() == 0 else logging.ERROR)
