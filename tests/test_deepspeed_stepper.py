"""DeepSpeed in place of DDP: the same weights after the same steps, exact resume, and weights that others can read.

Fine-tuning runs on real mp4 clips, in processes of a fork server that has imported torch and DeepSpeed already.
"""

import importlib.util
import json
import os
import runpy
import signal
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from fixtures_video import ROOT, fork_server, free_port, in_child

import checkpoints
from deepspeed_stepper import FOLDER, DeepSpeedStepper, remove_unused, with_deepspeed
from modeling_finetune import MODELS
from optim_factory import Stepper, build_optimizer, parameter_groups
from utils import EXIT_REQUEUE
from weights import load_encoder, read_checkpoint

pytest_plugins = "fixtures_video"
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")

NAME = "run_class_finetuning.py"
STAGES = {stage: ["--enable_deepspeed", "--zero_stage", str(stage)] for stage in (0, 1, 2)}
MODEL_STATES = "mp_rank_00_model_states.pt"


# Running the program --------------------------------------------------------------------------------------------


def program(argv, output, env, event):
    """Be ``python run_class_finetuning.py ARGV``, to which an event happens."""
    for number in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(env)
    torch.set_num_threads(1)
    if event == "SIGTERM in step 2":
        DeepSpeedStepper.step = signalled(2, signal.SIGTERM, DeepSpeedStepper.step)
    elif event == "SIGKILL in save 2":  # DeepSpeed's files are written by then, the .pth is not
        checkpoints.write_atomically = signalled(2, signal.SIGKILL, checkpoints.write_atomically)
    sys.argv = [NAME, *argv]
    runpy.run_path(str(ROOT / NAME), run_name="__main__")


def signalled(count, number, function):
    """`function`, but its call number `count` sends a signal to this process first."""
    calls = []

    def wrapped(*args):
        calls.append(args)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return function(*args)

    return wrapped


@pytest.fixture(scope="module")
def run(clips, tmp_path_factory):
    """Fine-tune on ten videos of three classes, five steps of two: returns the folder, and checks the exit code."""
    root = tmp_path_factory.mktemp("deepspeed")
    videos = [path for name, path in clips.items() if name != "short.mp4"] * 2
    for name, count in (("train", 10), ("val", 2), ("test", 3)):
        lines = [f"{video} {number % 3}\n" for number, video in enumerate(videos[:count])]
        (root / f"{name}.csv").write_text("".join(lines))
    options = """--data_set custom --nb_classes 3 --model vit_tiny_patch16_224 --input_size 32 --num_frames 4
        --sampling_rate 2 --num_workers 0 --aa= --mixup 0 --cutmix 0 --reprob 0 --batch_size 1 --epochs 1 --lr 0.1
        --warmup_epochs 0 --init_scale 1 --clip_grad 1 --log_interval 1 --test_num_segment 1
        --test_num_crop 1""".split()
    options += ["--data_path", str(root)]

    def run(name, *argv, processes=1, event="", code=0):
        folder, output = root / name, root / f"{name}.out"
        argv = [*options, "--output_dir", str(folder), "--update_freq", str(2 // processes), *argv]
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        started = [
            fork_server().Process(target=program, args=(argv, output, env, event))
            for env in ({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes))
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(300)
            process.kill()
        codes = [process.exitcode for process in started]
        assert set(codes) == {code}, output.read_text()[-3000:]
        return folder

    return run


def weights(folder, name="checkpoint-0.pth"):
    return read_checkpoint(folder / name)["model"]


def distance(one, other):
    """Largest difference of two state dicts."""
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def plain(run):
    """The run without DeepSpeed that all others are compared with."""
    return run("plain")


@pytest.fixture(scope="module")
def stage1(run):
    return run("stage1", *STAGES[1])


# The same steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_process_learns_what_it_learns_without_deepspeed(run, plain, stage1, stage):
    """fp32, five steps of two micro-batches with clipped gradients, layer decay and schedule."""
    folder = stage1 if stage == 1 else run(f"stage{stage}", *STAGES[stage])
    assert distance(weights(folder), weights(plain)) < 1e-6
    one, other = (json.loads((f / "log.txt").read_text().splitlines()[0]) for f in (folder, plain))
    for name in ("train_loss", "train_grad_norm", "train_acc1", "lr", "weight_decay", "val_acc1", "skipped_steps"):
        assert one[name] == pytest.approx(other[name], rel=1e-4), name
    config = json.loads((folder / "deepspeed_config.json").read_text())
    assert config["zero_optimization"]["stage"] == stage and config["gradient_accumulation_steps"] == 2
    assert config["train_micro_batch_size_per_gpu"] == 1 and config["gradient_clipping"] == 1
    assert not config["fp16"]["enabled"] and not config["bf16"]["enabled"]
    assert not (plain / "deepspeed_config.json").exists()


def test_the_weights_moved(run, plain):
    """So that the comparisons mean something."""
    start = run("untouched", "--lr", "0", "--min_lr", "0", "--weight_decay", "0")
    assert distance(weights(start), weights(plain)) > 1e-3


def test_two_processes_learn_what_they_learn_with_ddp(run, plain):
    ddp, deepspeed = run("ddp", processes=2), run("two", *STAGES[2], processes=2)
    assert distance(weights(deepspeed), weights(ddp)) < 1e-6
    assert distance(weights(deepspeed), weights(plain)) < 1e-6


# Saving ---------------------------------------------------------------------------------------------------------


def test_resume_after_sigkill_between_shards_and_checkpoint(run, stage1):
    """The optimizer state that belongs to the .pth there is must have survived."""
    argv = [*STAGES[1], "--save_ckpt_steps", "1"]
    folder = run("killed", *argv, event="SIGKILL in save 2", code=-signal.SIGKILL)
    assert {path.name for path in folder.glob(f"{FOLDER}/check*")} == {"checkpoint-latest", "checkpoint-latest-b"}
    assert read_checkpoint(folder / "checkpoint-latest.pth")["optimizer"]["deepspeed"] == "checkpoint-latest"
    run("killed", *argv)
    assert "checkpoint-latest.pth at epoch 0, step" in folder.with_suffix(".out").read_text()
    assert distance(weights(folder), weights(stage1)) < 1e-6
    assert {path.name for path in folder.glob(f"{FOLDER}/check*")} == {path.stem for path in folder.glob("*.pth")}


def test_resume_of_two_processes_after_sigterm(run, plain):
    folder = run("told", *STAGES[1], processes=2, event="SIGTERM in step 2", code=EXIT_REQUEUE)
    run("told", *STAGES[1], code=1)  # one process cannot read the shards of two
    assert "'processes': 2}, this run has" in folder.with_suffix(".out").read_text()
    run("told", *STAGES[1], processes=2)
    assert "checkpoint-latest.pth at epoch 0, step 3" in folder.with_suffix(".out").read_text()
    assert distance(weights(folder), weights(plain)) < 1e-6


def test_low_precision_average_and_weights_that_can_be_read(run, plain):
    """bf16: its checkpoints give the scores of its own test, through --eval; the average of the weights is fp32."""
    argv = ["--precision", "bf16", "--model_ema", "--model_ema_decay", "0.5"]
    folder = run("bf16", *STAGES[2], *argv)
    config = json.loads((folder / "deepspeed_config.json").read_text())
    assert config["bf16"]["enabled"] and not config["fp16"]["enabled"]
    saved = read_checkpoint(folder / "checkpoint-0.pth")
    assert {value.dtype for value in saved["model"].values()} == {torch.bfloat16}
    assert {value.dtype for value in saved["model_ema"].values()} == {torch.float32}
    assert distance(saved["model"], weights(plain)) < 0.02
    again = run("bf16-eval", "--eval", "--finetune", str(folder / "checkpoint-best.pth"), *argv)
    assert np.array_equal(*(np.load(f / "test_predictions.npz")["scores"] for f in (folder, again)))


def test_deepspeeds_own_file_is_a_checkpoint_too(run, stage1):
    """mp_rank_00_model_states.pt, read without running what is in it: for --eval, and to start from."""
    file = stage1 / FOLDER / "checkpoint-0" / MODEL_STATES
    assert distance(read_checkpoint(file)["module"], weights(stage1)) == 0
    again = run("eval", "--eval", "--finetune", str(file))
    assert np.array_equal(*(np.load(f / "test_predictions.npz")["scores"] for f in (stage1, again)))
    for path in (file, stage1 / "checkpoint-0.pth"):
        model = MODELS["vit_tiny_patch16_224"](num_classes=3)
        load_encoder(model, path, need_head=True)
        assert distance(model.state_dict(), weights(stage1)) == 0


def test_shards_without_a_checkpoint_are_removed(tmp_path):
    for name in ("checkpoint-3", "checkpoint-4", "checkpoint-latest", "checkpoint-latest-b", "checkpoint-best"):
        (tmp_path / FOLDER / name).mkdir(parents=True)
        (tmp_path / FOLDER / name / "shard.pt").touch()
    (tmp_path / FOLDER / "latest").write_text("checkpoint-4")
    for name, tag in (("checkpoint-4", "checkpoint-4"), ("checkpoint-latest", "checkpoint-latest-b")):
        torch.save({"optimizer": {"deepspeed": tag}}, tmp_path / f"{name}.pth")
    torch.save({"optimizer": {"state": {}}}, tmp_path / "checkpoint-7.pth")
    (tmp_path / "checkpoint-best.pth").write_bytes(b"damaged")
    remove_unused(str(tmp_path))
    left = {path.name for path in (tmp_path / FOLDER).iterdir()}
    assert left == {"checkpoint-4", "checkpoint-latest-b", "checkpoint-best", "latest"}


# The stepper by itself ------------------------------------------------------------------------------------------


def stepper_of(stage, precision="fp32", opt="adamw", output_dir="", fp16_on_cpu=False):
    torch.set_num_threads(1)
    if fp16_on_cpu:  # DeepSpeed refuses it there for its slowness
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        CPU_Accelerator.is_fp16_supported = lambda self: True
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))
    optimizer = build_optimizer(parameter_groups(model, 0.05), opt, 1e-2)
    stepper = Stepper(model, optimizer, torch.device("cpu"), precision, 1, lambda step: 1e-2, lambda step: 0.05, 0.5)
    return with_deepspeed(stepper, stage, 4, opt, output_dir)


def one_step(stepper, factor=1.0):
    stepper.schedule(0)
    torch.manual_seed(1)
    loss = factor * F.cross_entropy(stepper.model(torch.randn(4, 8)), torch.tensor([0, 1, 2, 0]))
    stepper.backward(loss)
    return {name: value.item() for name, value in stepper.step(loss.detach()).items()}


def copy_of(stepper):
    return {name: value.clone() for name, value in stepper.module.state_dict().items()}


def skipping():
    outcome = []
    for precision, stage in product(("fp32", "bf16"), (0, 1, 2)):
        stepper = stepper_of(stage, precision)
        start = copy_of(stepper)
        bad = one_step(stepper, float("nan"))
        kept = all(torch.equal(start[name], value) for name, value in copy_of(stepper).items())
        good = one_step(stepper)
        moved = distance(start, copy_of(stepper)) > 0
        outcome.append((bad["bad"], kept, good["bad"], np.isfinite(good["grad_norm"]), moved))
    return outcome


def test_a_step_that_is_not_finite_changes_nothing():
    outcome, error = in_child(skipping)
    assert error is None and outcome == [(1, True, 0, True, True)] * 6


def norms_and_weights():
    outcome = []
    for precision, stage in product(("fp32", "bf16", "fp16"), (0, 1, 2)):
        stepper = stepper_of(stage, precision, fp16_on_cpu=True)
        norms = [one_step(stepper)["grad_norm"] for step in range(4)]
        outcome.append((norms, nn.utils.parameters_to_vector(stepper.module.parameters()).detach().float().numpy()))
    return outcome


def test_precisions_and_stages_agree():
    """Gradient norms are those before clipping and without loss scale; no step is made while starting."""
    outcome, error = in_child(norms_and_weights)
    assert error is None
    right_norms, right_weights = outcome[0]
    for norms, state in outcome:
        assert norms == pytest.approx(right_norms, rel=0.01)
        assert abs(state - right_weights).mean() < 1e-3


def full_disk(folder):
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine as Engine

    def fail(self, state_dict, path):
        raise OSError("No space left on device")

    stepper, save = stepper_of(1, output_dir=str(folder)), Engine.save
    writer = checkpoints.CheckpointWriter(str(folder))
    written = []
    for number in range(3):
        one_step(stepper)
        Engine.save = fail if number == 1 else save
        stepper.save_shards(str(folder), checkpoints.LATEST)
        content = lambda: {"model": stepper.module.state_dict(), **stepper.state()}
        written.append(writer.save(checkpoints.LATEST, content))
        found = read_checkpoint(folder / checkpoints.LATEST)
        fresh = stepper_of(1)
        fresh.load(found, folder / checkpoints.LATEST)
        assert distance(copy_of(fresh), found["model"]) == 0
    return written, one_step(fresh) == one_step(stepper)


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path):
    assert in_child(full_disk, tmp_path) == (([True, False, True], True), None)


def test_what_cannot_be_done_is_said():
    _, error = in_child(stepper_of, 1, "fp32", "lamb")
    assert error.startswith("ValueError: --zero_stage 1") and "--opt lamb needs --zero_stage 0" in error
    _, error = in_child(load_ordinary)
    assert error.startswith("utils.RunError: x.pth is of a run without DeepSpeed, this run has {'zero_stage': 1")


def load_ordinary():
    stepper_of(1).load({"optimizer": {"state": {}, "param_groups": []}, "scaler": {}}, Path("x.pth"))
