"""The optimizer step by DeepSpeed (``--enable_deepspeed``): ZeRO stages 1 and 2 in fp32, bf16 or fp16.

In bf16 and fp16 the model has this precision, and DeepSpeed's optimizer keeps fp32 master weights. Each checkpoint has
its optimizer state in a folder of ``OUTPUT_DIR/deepspeed/``; the .pth file holds the weights and the folder's name.
deepspeed is imported where a stepper is built, since the import takes seconds and few runs need it.
"""

import json
import logging
import os
import shutil
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from optim_factory import DTYPES, Stepper, propagate_non_finite
from utils import RunError, barrier, broadcast, first_line, rank, reduce_sum, world_size
from weights import read_checkpoint

FOLDER = "deepspeed"  # of OUTPUT_DIR
ELEMENTWISE = ("adamw", "adam", "sgd")  # optimizers whose state ZeRO may cut anywhere
BUCKET = 50_000_000  # numbers exchanged at a time; with DeepSpeed's default their buffer takes 2 GB


class DeepSpeedStepper(Stepper):
    """A Stepper whose `model` is a DeepSpeed engine; see with_deepspeed."""

    model: Any  # DeepSpeed has no types

    def __post_init__(self):
        stage = self.model.zero_optimization_stage()
        # a checkpoint can be read only by a run with the same layout
        self.layout = {"zero_stage": stage, "precision": self.precision, "processes": world_size()}
        self.tag, self.failed, self.casts = "", False, []
        if self.precision != "fp32":  # clips in low precision, logits in fp32, in training and validation alike
            dtype = DTYPES[self.precision]
            self.casts = [
                self.module.register_forward_pre_hook(lambda module, inputs: tuple(x.to(dtype) for x in inputs)),
                self.module.register_forward_hook(lambda module, inputs, output: output.float()),
            ]

    @property
    def module(self) -> nn.Module:
        return self.model.module

    def autocast(self) -> AbstractContextManager:
        return nullcontext()

    def sync(self, micro_batch: int) -> AbstractContextManager:
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        self.model.backward(propagate_non_finite(loss))
        if not self.model.is_gradient_accumulation_boundary():
            self.model.step()  # only counts the micro-batch

    def step(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        self.model.step()
        norm, bad = self.model.get_global_grad_norm(), self.model.optimizer.overflow
        if self.precision == "fp16":  # an overflow only lowers the scale
            bad = not loss.isfinite()
        values = {"grad_norm": float(norm), "bad": float(bad)}
        return {name: torch.tensor(value, device=self.device) for name, value in values.items()}

    def state(self) -> dict[str, Any]:
        if self.failed:  # CheckpointWriter counts an OSError as a failed save
            raise OSError("DeepSpeed's optimizer state could not be written")
        return {"optimizer": {"deepspeed": self.tag, **self.layout}, "scaler": {}}

    def save_shards(self, folder: str, name: str) -> None:
        """Write the optimizer state of a checkpoint; the old state stays until the new .pth replaces the old one."""
        if not folder:
            return
        shards, stem, failed = Path(folder) / FOLDER, Path(name).stem, False
        if rank() == 0:
            remove_unused(folder)
        self.tag = broadcast(f"{stem}-b" if (shards / stem).exists() else stem)
        try:
            self.model.save_checkpoint(str(shards), tag=self.tag)
        except (OSError, RuntimeError):
            failed = True
            barrier()  # where the others wait
        self.failed = reduce_sum([float(failed)], self.device)[0] > 0

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Read the shards of the checkpoint at `path` without running anything in them."""
        layout = dict(state["optimizer"])
        tag = layout.pop("deepspeed", None)
        if tag is None or layout != self.layout:
            raise RunError(
                f"{path} is of {layout if tag else 'a run without DeepSpeed'}, this run has {self.layout}; "
                "to go on with its weights alone, give it to --finetune with another --output_dir"
            )
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        groups = self.optimizer.param_groups
        own = [{k: value for k, value in group.items() if k != "params" and not k.endswith("step")} for group in groups]
        os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # DeepSpeed itself would unpickle anything
        try:
            with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
                self.model.load_checkpoint(str(path.parent / FOLDER), tag=tag)
        except Exception as error:
            reason = first_line(error)[:200]
            raise RunError(f"{path.parent / FOLDER / tag}: cannot be read by DeepSpeed ({reason})") from error
        finally:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        self.model.optimizer.clip_grad = self.clip_grad or 0.0  # not that of the checkpoint
        for group, options in zip(self.optimizer.param_groups, own):
            group.update(options)

    def close(self, folder: str) -> None:
        """After training, convert the model to fp32 and remove shards whose .pth is gone."""
        for cast in self.casts:
            cast.remove()
        self.module.float()
        if folder and rank() == 0:
            remove_unused(folder)


def remove_unused(folder: str) -> None:
    """Remove the shards that no .pth names."""
    used = set()
    for path in Path(folder).glob("checkpoint-*.pth"):
        try:
            used.add(read_checkpoint(path, whole=False)["optimizer"].get("deepspeed"))
        except Exception:  # an unreadable .pth keeps what may belong to it
            used |= {path.stem, f"{path.stem}-b"}
    for shards in (Path(folder) / FOLDER).glob("checkpoint-*"):
        if shards.name not in used:
            shutil.rmtree(shards, ignore_errors=True)


def with_deepspeed(stepper: Stepper, zero_stage: int, batch_size: int, output_dir: str) -> DeepSpeedStepper:
    """Return a stepper by DeepSpeed; its configuration is also written to ``output_dir/deepspeed_config.json``.

    Args:
        stepper: its model must not be wrapped in DDP, and is changed; its optimizer must be one of ELEMENTWISE.
        batch_size: clips per process and forward pass.
    """
    os.environ.setdefault("DS_ACCELERATOR", stepper.device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.distributed.*deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes minutes to compile, and is never called
    if not dist.is_initialized():
        backend = "nccl" if stepper.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    config = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": stepper.update_freq,
        "gradient_clipping": stepper.clip_grad or 0.0,
        "zero_optimization": {"stage": zero_stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
        "zero_allow_untested_optimizer": True,  # SGD
        "fp16": {"enabled": stepper.precision == "fp16"},  # dynamic loss scale
        "bf16": {"enabled": stepper.precision == "bf16"},
    }
    if output_dir and rank() == 0:
        (Path(output_dir) / "deepspeed_config.json").write_text(json.dumps(config, indent=2) + "\n")
    for group in stepper.optimizer.param_groups:
        group["lr"] = 0.0  # until scheduled: a step is made here to create the optimizer's state
    engine, *_ = deepspeed.initialize(model=stepper.model, optimizer=stepper.optimizer, config=config)
    stepper.optimizer.state.clear()
    return DeepSpeedStepper(engine, *(getattr(stepper, field.name) for field in fields(Stepper)[1:]))
