"""Seeds, errors, processes, signals, the console, and what GPUs torch has kernels for."""

import fcntl
import os
import pty
import random
import re
import signal
import struct
import sys
import termios
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixtures_video import fork_server, in_child, launched

import evaluation
import utils
from meters import RunLog, StepMeter
from optim_factory import Stepper, build_optimizer, distribute, parameter_groups
from utils import EXIT_REQUEUE, Control, RunError, seed_everything

CPU = torch.device("cpu")


# Seeds ----------------------------------------------------------------------------------------------------------


def draws(*key):
    seed_everything(*key)
    return torch.rand(2).tolist() + np.random.rand(2).tolist() + [random.random()]


def test_seeds_repeat_and_differ():
    assert draws(0, 1, 2) == draws(0, 1, 2)
    seen = {tuple(draws(seed, epoch, chunk)) for seed in range(3) for epoch in range(5) for chunk in range(20)}
    assert len(seen) == 300 and len({row[0] for row in seen}) > 290  # torch.rand gives 24 bits


# Single process -------------------------------------------------------------------------------------------------


def test_helpers_work_in_one_process():
    assert (utils.rank(), utils.world_size(), utils.broadcast({"a": 1})) == (0, 1, {"a": 1})
    assert utils.reduce_sum([1, 2.5], CPU) == [1, 2.5]
    utils.barrier()


def test_user_errors_become_one_line_errors():
    for error in (ValueError("--lr x: wrong"), FileNotFoundError(2, "no such file", "/a/b")):
        with pytest.raises(RunError, match="--lr x: wrong|/a/b"), utils.user_errors():
            raise error
    with pytest.raises(ZeroDivisionError), utils.user_errors():
        raise ZeroDivisionError


def test_exit_codes(capfd, tmp_path):
    def fails():
        raise RunError("--flag x: wrong")

    def writes():
        (tmp_path / "none" / "x.csv").write_text("")

    ends = ((lambda: 0, 0), (lambda: None, 0), (lambda: utils.EXIT_REQUEUE, 85))
    for function, code in ((fails, 1), (writes, 1), *ends):
        with pytest.raises(SystemExit) as exit_:
            utils.run_main(function)
        assert exit_.value.code == code
    assert (
        capfd.readouterr().err == f"error: --flag x: wrong\nerror: {tmp_path}/none/x.csv: No such file or directory\n"
    )


# Two processes --------------------------------------------------------------------------------------------------


def pair_of(folder, shared, rank):
    """Be one of two processes: note what it sees; then the second one fails."""
    os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
    os.dup2(os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
    device = utils.init_distributed("cpu", 1)
    meter = StepMeter(RunLog("", ""), device, 0, 1, 2, 2)
    for step in range(2):
        meter.update(step, {"loss": torch.tensor(1.0 + rank + step), "bad": torch.tensor(float(rank * step))}, ["x"])
    control, heard, kept = Control(), [], []
    control.listen()
    for step in range(4):
        if step == 1 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        heard.append(control.agree(save=step == 2 and rank == 0))
    control.close()
    for precision in ("fp32", "fp16"):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 1)
        optimizer = build_optimizer(parameter_groups(model, 0.05), "adamw", 0.1)
        constant = lambda step: 0.1
        stepper = Stepper(distribute(model, device), optimizer, device, precision, 1, constant, constant)
        stepper.schedule(0)
        loss = stepper.model(torch.ones(4, 2)).sum() + (float("inf") if rank == 1 else 0)  # finite gradients
        stepper.backward(loss)
        stepper.step(loss.detach())
        kept.append(model.weight.tolist())
    seen = utils.reduce_sum([1, rank], device), utils.broadcast(rank + 5), meter.averages(), heard, kept
    (folder / str(rank)).write_text(repr(seen))

    def fail():
        utils.barrier()
        if utils.rank() == 1:
            with utils.user_errors():
                raise ValueError("only process 1 saw it")
        utils.barrier()

    utils.run_main(fail)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two processes over Gloo: what each saw, and how they ended."""
    folder, shared = tmp_path_factory.mktemp("pair"), launched(2)
    processes = [fork_server().Process(target=pair_of, args=(folder, shared, rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    codes, said = [process.exitcode for process in processes], [(folder / f"{rank}.err").read_text() for rank in (0, 1)]
    return [eval((folder / str(rank)).read_text()) for rank in range(2)], codes, "".join(said)


def test_two_processes_decide_alike(pair):
    for sums, value, averages, heard, kept in pair[0]:
        assert (sums, value) == ([2.0, 1.0], 5)
        assert averages == {"train_loss": 1.5, "skipped_steps": 1}  # the mean of both; a step bad in one is skipped
        assert heard == [(False, False), (False, False), (True, False), (True, True)]  # one step late
        torch.manual_seed(0)
        assert kept == [torch.nn.Linear(2, 1).weight.tolist()] * 2  # a loss that is bad in one is no step for any


def test_an_error_of_any_process_is_reported(pair):
    assert 0 not in pair[1] and pair[2].count("error: only process 1 saw it") == 1


# Signals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noted(number):
    """It ends at once what has nothing to save; and so does a second interrupt."""

    def told(close=False, again=False):
        control = Control()
        control.listen()
        before = control.agree(False)
        if close:
            control.close()
        os.kill(os.getpid(), number)
        if close or again:
            time.sleep(0.1)
            os.kill(os.getpid(), number)
            time.sleep(1)
        return before, control.agree(False), control.agree(True)

    assert in_child(told) == (((False, False), (True, False), (True, True)), None)
    assert in_child(told, True) == (None, f"SystemExit: {EXIT_REQUEUE}")
    if number == signal.SIGINT:
        assert in_child(told, False, True) == (None, f"died: {-signal.SIGINT}")


# The console ----------------------------------------------------------------------------------------------------


def talk(number):
    """A program with a progress bar, which ends with an error in mid-loop; its console is the open file `number`."""
    os.dup2(number, 1)
    os.dup2(number, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    utils.setup_logging()

    def items(title):
        return (item for item, _ in enumerate(evaluation.progress([{"views": [0]}] * 40, title)))

    def main():
        utils.logger.info("before")
        for item in items("validation"):
            time.sleep(0.01)
            if item % 15 == 14:
                utils.logger.info("message of item %d", item)
        utils.logger.info("after")
        for item in items("test"):
            time.sleep(0.01)
            if item == 25:
                raise RunError("a video is missing")

    utils.run_main(main)


TALK = ["before", "message of item 14", "message of item 29", "after", "error: a video is missing"]


def screen_of(text):
    """What a terminal shows in the end."""
    rows, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[A|\r|\n|[^\x1b\r\n]+", text):
        if piece == "\x1b[A":
            row -= 1
        elif piece == "\r":
            column = 0
        elif piece == "\n":
            row += 1
            rows += [""] * (row == len(rows))
        else:
            rows[row] = rows[row][:column].ljust(column) + piece + rows[row][column + len(piece) :]
            column += len(piece)
    return [line.rstrip() for line in rows if line.strip()]


def without_time(lines):
    return [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines]


def test_progress_bars_make_way_for_messages_on_a_terminal():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    read = [b""]

    def listen():
        while not read[-1].endswith(b"\0"):
            read.append(os.read(ours, 1000))

    reader = threading.Thread(target=listen, daemon=True)
    reader.start()
    assert in_child(talk, theirs)[1] == "SystemExit: 1"
    os.write(theirs, b"\0")  # nothing comes after it
    reader.join()
    text = b"".join(read).decode()
    assert "validation: 0 views" in text and "test: 0 views" in text  # the bars were there
    assert without_time(screen_of(text.rstrip("\0"))) == TALK


def test_no_progress_bar_in_a_file(tmp_path):
    with open(tmp_path / "log", "w") as file:
        assert in_child(talk, file.fileno())[1] == "SystemExit: 1"
    text = (tmp_path / "log").read_text()
    said = [TALK[0], "validation begins", *TALK[1:4], "test begins", TALK[4]]
    assert without_time(text.splitlines()) == said and "\r" not in text


# Kernels --------------------------------------------------------------------------------------------------------

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # torch 2.14's
CUDA_12 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]  # torch 2.5's


@pytest.mark.parametrize(
    "capability, built_for, remedy",
    [
        ((7, 0), CUDA_13, "constraints-v100.txt"),  # V100
        ((7, 0), CUDA_12, ""),
        ((7, 2), CUDA_12, ""),  # the same major version
        ((8, 9), CUDA_13, ""),  # RTX 4090
        ((9, 0), CUDA_13, ""),
        ((9, 0), ["sm_90a"], ""),
        ((12, 1), CUDA_13, ""),
        ((10, 0), CUDA_12, "a newer torch"),  # B200
        ((10, 0), [*CUDA_12, "compute_90"], ""),  # compiled on the spot
        ((7, 0), ["sm_75", "compute_90"], "constraints-v100.txt"),
        ((8, 0), ["sm_75", "sm_86"], "a newer torch"),  # machine code of a later minor version
        ((9, 0), ["gfx90a", "gfx942"], ""),  # AMD's are not judged
    ],
)
def test_which_gpus_torch_has_kernels_for(capability, built_for, remedy):
    problem = utils.kernel_problem("Tesla V100", capability, built_for)
    assert bool(problem) == bool(remedy) and remedy in problem and "\n" not in problem
    if problem:
        assert problem.startswith(f"Tesla V100 (compute capability {capability[0]}.{capability[1]}): torch ")
        assert all(name in problem for name in built_for)


def test_a_gpu_without_kernels_ends_a_program_at_its_start(monkeypatch):
    card = SimpleNamespace(name="Tesla V100-SXM2-16GB", major=7, minor=0)
    answers = {"is_available": True, "device_count": 1, "set_device": None, "get_device_properties": card}
    for name, answer in (answers | {"get_arch_list": CUDA_13}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    with pytest.raises(RunError, match="Tesla V100-SXM2-16GB .*no kernels"):
        utils.init_distributed()
    assert utils.init_distributed("cpu") == CPU
