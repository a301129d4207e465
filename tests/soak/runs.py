"""Real runs of run_smile_pretraining.py on a small model, to be killed and resumed; several processes are started by
the launcher that SMILE and VideoMAE start with, which is torchrun under an older name.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch
from fixtures_video import ROOT, free_port, source_frames, write_list, write_mp4

STEP = re.compile(r"epoch (\d+) \[(\d+)/\d+\]  loss (\S+)")
RESUME = re.compile(r"resuming from \S+ at epoch (\d+), step (\d+)")
OPTIONS = """--model pretrain_videomae_tiny_patch16_224 --target_type pixel --decoder_depth 1 --input_size 32
    --num_frames 4 --sampling_rate 1 --add_tubelets --scales 32 48 64 --mask_type tubelet
    --mask_ratio 0.75 --batch_size 2 --epochs 2 --warmup_epochs 1 --lr 0.1 --num_workers 2
    --device cpu --log_interval 1 --save_ckpt_freq 1 --save_ckpt_minutes 0 --save_ckpt_steps 2""".split()


def make_videos(folder, count, name="bikes"):
    """A list file of `count` short clips cut from a real video, 64 x 48."""
    frames = source_frames(name, 0, 48, (64, 48))
    for number in range(count):
        write_mp4(folder / f"{number}.mp4", frames[(2 * number) % 32 :][:16])
    return write_list(folder / "list.csv", [folder / f"{number}.mp4" for number in range(count)])


class Run:
    """A program under way.

    Args:
        processes: 1, or the ranks to start under torchrun.
        restarts: torchrun's --max-restarts.
        before: Python code to run in the program's process before the program.
    """

    def __init__(self, list_file, output_dir, *options, processes=1, restarts=0, before=""):
        program = str(ROOT / "run_smile_pretraining.py")
        launch = [sys.executable, "-u", program]
        if processes > 1:
            launch[2:2] = f"""-m torch.distributed.launch --use_env --nnodes 1 --node_rank 0 --master_addr 127.0.0.1
                --master_port {free_port()} --nproc_per_node {processes} --max-restarts {restarts}""".split()
        if before:
            launch[2:] = ["-c", f"{before}\nimport runpy\nrunpy.run_path({program!r}, run_name='__main__')"]
        command = [*launch, "--data_path", str(list_file), "--output_dir", str(output_dir), *OPTIONS, *options]
        console, self.console = tempfile.mkstemp(dir=Path(output_dir).parent)
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=console, stderr=console)
        os.close(console)

    def text(self):
        """All whole lines that were printed."""
        return Path(self.console).read_text().rpartition("\n")[0]

    def find(self, pattern):
        """All console lines in which the pattern is found."""
        return [line for line in self.text().splitlines() if re.search(pattern, line)]

    def wait_for(self, pattern, count=1, timeout=300):
        """Wait until so many lines match; False if the program ends before."""
        deadline = time.monotonic() + timeout
        while len(self.find(pattern)) < count:
            if self.process.poll() is not None:
                return len(self.find(pattern)) >= count
            assert time.monotonic() < deadline, f"no {pattern!r} in {timeout} s: {self.text()[-2000:]}"
            time.sleep(0.02)
        return True

    def wait(self, timeout=400):
        """Wait for the end; returns the exit code."""
        return self.process.wait(timeout)

    def steps(self):
        """{(epoch, step from 0): loss as printed} of the console lines, in their order."""
        found = STEP.finditer(self.text())
        return {(int(match[1]), int(match[2]) - 1): match[3] for match in found}

    def resumed_at(self):
        """(epoch, step) at which the run went on; (0, 0) if it started anew."""
        found = RESUME.search(self.text())
        return (int(found[1]), int(found[2])) if found else (0, 0)

    def ranks(self):
        """Process ids of the training processes, without their loader workers."""
        if "torch.distributed.launch" not in self.process.args:
            return [self.process.pid]
        return children(self.process.pid)

    def kill(self):
        """SIGKILL to the program, and to torchrun above it, as when a node is lost."""
        pids = {self.process.pid, *self.ranks()}
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def children(pid):
    """Process ids of a process's children, whichever of its threads started them."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except (FileNotFoundError, ProcessLookupError):  # that thread has ended
            continue
    return sorted(found)


def gone(pids, seconds=120):
    """Whether none of these processes is left within so many seconds."""
    deadline = time.monotonic() + seconds
    while any(
        Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in pids
    ):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def checkpoint(output_dir, name="checkpoint-1.pth"):
    """A run's checkpoint, the second epoch's unless another is named."""
    return torch.load(Path(output_dir) / name, weights_only=False)


def equal(one, other):
    """Whether two nested values are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def same_end(one, other):
    """Whether two runs ended with the same weights and optimizer state."""
    one, other = checkpoint(one), checkpoint(other)
    return all(equal(one[key], other[key]) for key in ("model", "optimizer", "scaler", "epoch", "step"))
