"""DeepSpeed in place of DDP: the same weights after the same steps, exact resume, and weights that others can read.

Fine-tuning runs on real mp4 clips, in processes of a fork server that has imported torch and DeepSpeed already.
"""

import functools
import importlib.util
import json
import os
import pkgutil
import signal
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from fixtures_finetuning import CUSTOM, PLAIN, TINY
from fixtures_programs import log_of
from fixtures_video import in_child

import checkpoints
from deepspeed_stepper import FOLDER, remove_unused, with_deepspeed
from modeling_finetune import MODELS
from optim_factory import Stepper, build_optimizer, parameter_groups
from utils import EXIT_REQUEUE, RunError
from weights import load_encoder, read_checkpoint

pytest_plugins = "fixtures_finetuning"
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")

STAGES = {stage: ["--enable_deepspeed", "--zero_stage", str(stage)] for stage in (0, 1, 2)}
OPTIONS = """--batch_size 1 --epochs 1 --lr 0.1 --layer_decay 0.75 --warmup_epochs 0 --init_scale 1 --clip_grad 1
    --test_num_segment 1 --test_num_crop 1 --drop_path 0.1""".split()


# Running the program --------------------------------------------------------------------------------------------


def signalled(owner, name, count, number):
    """Have call number `count` of a function send a signal to its process first."""
    owner, calls = pkgutil.resolve_name(owner), []
    function = getattr(owner, name)

    def wrapped(*args):
        calls.append(args)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return function(*args)

    setattr(owner, name, wrapped)


SIGTERM_IN_STEP_2 = functools.partial(signalled, "deepspeed_stepper:DeepSpeedStepper", "step", 2, signal.SIGTERM)
# DeepSpeed's files are written by then, the .pth is not
SIGKILL_IN_SAVE_2 = functools.partial(signalled, "checkpoints", "save_checkpoint", 2, signal.SIGKILL)


@pytest.fixture(scope="module")
def tune(run, clips, tmp_path_factory):
    """Fine-tune on ten videos of three classes, five steps of two: the folder, and what was said."""
    root = tmp_path_factory.mktemp("deepspeed")
    videos = [path for name, path in clips.items() if name != "short.mp4"] * 2
    for name, count in (("train", 10), ("val", 2), ("test", 3)):
        lines = [f"{video} {number % 3}\n" for number, video in enumerate(videos[:count])]
        (root / f"{name}.csv").write_text("".join(lines))

    def tune(name, *argv, processes=1, code=0, before=None):
        options = ["--data_path", root, "--output_dir", root / name, "--update_freq", 2 // processes, *argv]
        found = run(*CUSTOM, *TINY, *PLAIN, *OPTIONS, *options, processes=processes, before=before)
        assert set(found.codes) == {code}, found.all[-3000:]
        return root / name, found.all

    return tune


def weights(folder, name="checkpoint-0.pth"):
    return read_checkpoint(folder / name)["model"]


def distance(one, other):
    """Largest difference of two state dicts."""
    assert one.keys() == other.keys()
    return max((one[name].float() - other[name].float()).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def plain(tune):
    """The run without DeepSpeed that all others are compared with."""
    return tune("plain")[0]


@pytest.fixture(scope="module")
def stage1(tune):
    """Stage 0, which is DDP, runs as stage 1."""
    return tune("stage1", *STAGES[0])[0]


# The same steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_one_process_learns_what_it_learns_without_deepspeed(tune, plain, stage1, stage):
    """fp32, five steps of two micro-batches with clipped gradients, layer decay and schedule."""
    folder = stage1 if stage == 1 else tune("stage2", *STAGES[2])[0]
    assert distance(weights(folder), weights(plain)) < 1e-6
    one, other = log_of(folder)[0], log_of(plain)[0]
    for name in ("train_loss", "train_grad_norm", "train_acc1", "lr", "weight_decay", "val_acc1", "skipped_steps"):
        assert one[name] == pytest.approx(other[name], rel=1e-4), name
    config = json.loads((folder / "deepspeed_config.json").read_text())
    assert config["zero_optimization"]["stage"] == stage and config["gradient_accumulation_steps"] == 2
    assert config["train_micro_batch_size_per_gpu"] == 1 and config["gradient_clipping"] == 1
    assert not config["fp16"]["enabled"] and not config["bf16"]["enabled"]
    assert not (plain / "deepspeed_config.json").exists()


def test_two_processes_learn_what_one_learns(tune, plain):
    """As they do with DDP: test_run_class_finetuning.py."""
    assert distance(weights(tune("two", *STAGES[2], processes=2)[0]), weights(plain)) < 1e-6


# Saving ---------------------------------------------------------------------------------------------------------


def test_resume_after_sigkill_between_shards_and_checkpoint(tune, stage1):
    """The optimizer state that belongs to the .pth there is must have survived."""
    argv = [*STAGES[1], "--save_ckpt_steps", "1"]
    folder, _ = tune("killed", *argv, before=SIGKILL_IN_SAVE_2, code=-signal.SIGKILL)
    assert {path.name for path in folder.glob(f"{FOLDER}/check*")} == {"checkpoint-latest", "checkpoint-latest-b"}
    saved = read_checkpoint(folder / "checkpoint-latest.pth")
    assert saved["optimizer"]["deepspeed"] == "checkpoint-latest"
    assert distance(saved["model"], weights(stage1)) > 1e-4  # they moved: all these comparisons mean something
    assert "checkpoint-latest.pth at epoch 0, step" in tune("killed", *argv)[1]
    assert distance(weights(folder), weights(stage1)) < 1e-6
    assert {path.name for path in folder.glob(f"{FOLDER}/check*")} == {path.stem for path in folder.glob("*.pth")}


def test_resume_of_two_processes_after_sigterm(tune, plain):
    """Which one process cannot go on with, as it cannot read the shards of two."""
    folder, _ = tune("told", *STAGES[1], processes=2, before=SIGTERM_IN_STEP_2, code=EXIT_REQUEUE)
    assert "'processes': 2}, this run has" in tune("told", *STAGES[1], code=1)[1]
    assert "checkpoint-latest.pth at epoch 0, step 3" in tune("told", *STAGES[1], processes=2)[1]
    assert distance(weights(folder), weights(plain)) < 1e-6


def test_low_precision_average_and_weights_that_can_be_read(tune, plain):
    """bf16: its checkpoints give the scores of its own test, through --eval; the average of the weights is fp32."""
    argv = ["--precision", "bf16", "--model_ema", "--model_ema_decay", "0.5"]
    folder, _ = tune("bf16", *STAGES[2], *argv)
    config = json.loads((folder / "deepspeed_config.json").read_text())
    assert config["bf16"]["enabled"] and not config["fp16"]["enabled"]
    saved = read_checkpoint(folder / "checkpoint-0.pth")
    assert {value.dtype for value in saved["model"].values()} == {torch.bfloat16}
    assert {value.dtype for value in saved["model_ema"].values()} == {torch.float32}
    assert distance(saved["model"], weights(plain)) < 0.02
    again, _ = tune("bf16-eval", "--eval", "--finetune", folder / "checkpoint-best.pth", *argv)
    assert np.array_equal(*(np.load(f / "test_predictions.npz")["scores"] for f in (folder, again)))


def test_deepspeeds_own_file_is_a_checkpoint_too(tune, stage1):
    """mp_rank_00_model_states.pt, read without running what is in it: for --eval, and to start from."""
    file = stage1 / FOLDER / "checkpoint-0" / "mp_rank_00_model_states.pt"
    assert distance(read_checkpoint(file)["module"], weights(stage1)) == 0
    again, _ = tune("eval", "--eval", "--finetune", file)
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


def plain_stepper(precision="fp32"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3))
    optimizer = build_optimizer(parameter_groups(model, 0.05), "adamw", 1e-2)
    return Stepper(model, optimizer, torch.device("cpu"), precision, 1, lambda step: 1e-2, lambda step: 0.05, 0.5)


def stepper_of(stage, precision="fp32", output_dir="", fp16_on_cpu=False):
    torch.set_num_threads(1)
    if fp16_on_cpu:  # DeepSpeed refuses it there for its slowness
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        CPU_Accelerator.is_fp16_supported = lambda self: True
    return with_deepspeed(plain_stepper(precision), stage, 4, output_dir)


def one_step(stepper, factor=1.0):
    stepper.schedule(0)
    torch.manual_seed(1)
    loss = factor * F.cross_entropy(stepper.model(torch.randn(4, 8)), torch.tensor([0, 1, 2, 0]))
    stepper.backward(loss)
    return {name: value.item() for name, value in stepper.step(loss.detach()).items()}


def copy_of(stepper):
    return {name: value.clone() for name, value in stepper.module.state_dict().items()}


def skipping():
    """Of each precision and stage: what a step that is not finite and the next one do."""
    outcome = []
    for precision, stage in product(("fp32", "bf16"), (1, 2)):
        stepper = stepper_of(stage, precision)
        start = copy_of(stepper)
        bad = one_step(stepper, float("nan"))
        kept = all(torch.equal(start[name], value) for name, value in copy_of(stepper).items())
        good = one_step(stepper)
        moved = distance(start, copy_of(stepper)) > 0
        outcome.append((bad["bad"], kept, good["bad"], np.isfinite(good["grad_norm"]), moved))
    return outcome


def norms_and_weights():
    """Gradient norms of four steps and the weights then: plain, and of each precision and stage."""
    outcome = []
    for precision, stage in [("fp32", 0), *product(("fp32", "bf16", "fp16"), (1, 2))]:
        stepper = stepper_of(stage, precision, fp16_on_cpu=True) if stage else plain_stepper()
        norms = [one_step(stepper)["grad_norm"] for step in range(4)]
        outcome.append((norms, nn.utils.parameters_to_vector(stepper.module.parameters()).detach().float().numpy()))
    return outcome


def full_disk(folder):
    """Whether each of three saves was written, the second one on a full disk; and whether the last one goes on."""
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


def load_ordinary():
    """What it says of a checkpoint without DeepSpeed."""
    with pytest.raises(RunError) as told:
        stepper_of(1).load({"optimizer": {"state": {}, "param_groups": []}, "scaler": {}}, Path("x.pth"))
    return str(told.value)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What these functions return, in one process of its own, since importing DeepSpeed takes seconds."""
    folder = tmp_path_factory.mktemp("alone")
    outcome, error = in_child(lambda: (skipping(), full_disk(folder), load_ordinary(), norms_and_weights()))
    assert error is None, error
    return dict(zip(("skipping", "full disk", "ordinary", "norms"), outcome))


def test_a_step_that_is_not_finite_changes_nothing(alone):
    assert alone["skipping"] == [(1, True, 0, True, True)] * 4


def test_precisions_and_stages_agree(alone):
    """Gradient norms are those before clipping and without loss scale; no step is made while starting."""
    right_norms, right_weights = alone["norms"][0]
    for norms, state in alone["norms"]:
        assert norms == pytest.approx(right_norms, rel=0.01)
        assert abs(state - right_weights).mean() < 1e-3


def test_a_full_disk_leaves_the_old_checkpoint_whole(alone):
    assert alone["full disk"] == ([True, False, True], True)


def test_what_cannot_be_done_is_said(alone):
    assert alone["ordinary"].startswith("x.pth is of a run without DeepSpeed, this run has {'zero_stage': 1")
