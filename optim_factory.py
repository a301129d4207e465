"""Optimizers: precision, schedules, parameter groups, and the optimizer step. Optimizers and groups are timm's."""

import copy
import math
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from torch.nn.parallel import DistributedDataParallel

from utils import first_line, warn_once, world_size

NO_DECAY = ("*mask_token",)  # besides one-dimensional parameters
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FUSED = ("adamw", "adam")  # a fused SGD whose first step is skipped has uninitialised momentum


def cosine_schedule(step: int, base: float, final: float, total: int, warmup: int = 0, start: float = 0.0) -> float:
    """Return a value at `step`: linear from `start` to `base` over `warmup` steps, then a cosine to `final` at `total`.

    The last of several warm-up steps has the value `base`, a single one `start` (recipe of MAE and VideoMAE).
    """
    if step < warmup:
        return start + (base - start) * step / max(1, warmup - 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the context manager of a forward pass in fp32, bf16 or fp16."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def has_bf16_instructions() -> bool:
    """Return whether torch's matrix library uses the CPU's bf16 instructions.

    The library also says so of a CPU with AVX-512 without its bf16 part, where it converts; hence the second check.
    """
    usable = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return usable and (platform.machine() not in ("x86_64", "AMD64") or torch.cpu._is_avx512_bf16_supported())


def pick_precision(precision: str, device: torch.device) -> str:
    """Resolve `auto`: bf16 or fp16 on a GPU, fp32 on the CPU."""
    if precision == "bf16" and device.type == "cpu" and not has_bf16_instructions():
        warn_once("--precision bf16: this CPU has no instructions for it; fp32 is faster here, often many times")
    if precision != "auto":
        return precision
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Group parameters by layer and decay, each group with its ``names``, ``lr_scale`` and ``wd_scale``.

    One-dimensional parameters (biases, norms) and the mask token do not decay. A `layer_decay` below 1 multiplies the
    learning rate once for every layer above (BEiT's layer-wise decay); the model's ``group_matcher`` names the layers.
    """
    if layer_decay < 1:
        groups = param_groups_layer_decay(model, 1.0, NO_DECAY, layer_decay=layer_decay)
    else:
        groups = param_groups_weight_decay(model, 1.0, no_weight_decay_list=NO_DECAY)
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = list(names.values())
    groups.sort(key=lambda group: order.index(names[group["params"][0]]))  # the order of DeepSpeed's saved state
    for group in groups:
        group["names"] = [names[parameter] for parameter in group["params"]]
        group["wd_scale"], group["lr_scale"] = group["weight_decay"], group.get("lr_scale", 1.0)
        group["weight_decay"] *= weight_decay
    return groups


def build_optimizer(
    groups: list[dict[str, Any]],
    opt: str,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Create an optimizer of timm, in its fused form where torch has one.

    Raises ValueError if timm has no `opt`, or if it needs other arguments, a GPU or second derivatives.
    """
    if opt.lower() not in list_optimizers():
        raise ValueError(f"opt {opt}: timm has no such optimizer")
    if opt.lower() == "adahessian":
        raise ValueError(f"opt {opt}: needs second derivatives, which are not computed")
    options: dict[str, Any] = {"fused": True} if opt in FUSED else {}
    groups = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    try:
        return create_optimizer_v2(groups, opt, lr, 0.0, momentum, betas=betas, eps=eps, **options)
    except (AssertionError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"opt {opt}: cannot be used with these options here ({first_line(error)})") from error


def distribute(model: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a model in DDP if there are several processes."""
    if world_size() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def share_buffers(model: nn.Module) -> None:
    """Copy the buffers of process 0 to all others: running statistics differ between processes."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def propagate_non_finite(loss: torch.Tensor) -> torch.Tensor:
    """Return the loss; if it is not finite, its gradient will not be either (that of an infinite loss may be)."""
    return loss * (1 + 0 * loss.detach())


@dataclass
class Stepper:
    """Makes optimizer steps: precision, accumulation, clipping, schedules; without waiting for the device if possible.

    If the loss or gradient of a process is not finite, all processes skip the step, as they average gradients. Fused
    optimizers check this on the device.
    """

    model: nn.Module  # called in the forward pass, with or without DDP
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str
    update_freq: int  # micro-batches per step
    lr_schedule: Callable[[int], float]  # of an optimizer step, counted over the whole run
    weight_decay_schedule: Callable[[int], float]
    clip_grad: float | None = None  # largest gradient norm; None: no clipping

    def __post_init__(self):
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    @property
    def module(self) -> nn.Module:
        """The model itself, without DDP around it."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def autocast(self) -> AbstractContextManager:
        """Return the context manager of the forward pass."""
        return autocast(self.device, self.precision)

    def schedule(self, step: int) -> dict[str, float]:
        """Set learning rate and weight decay of an optimizer step and return them for the log."""
        lr, weight_decay = self.lr_schedule(step), self.weight_decay_schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            group["weight_decay"] = weight_decay * group["wd_scale"]
        return {"lr": lr, "weight_decay": weight_decay}

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradient of a micro-batch."""
        self.scaler.scale(propagate_non_finite(loss) / self.update_freq).backward()

    def sync(self, micro_batch: int) -> AbstractContextManager:
        """Return the context of forward and backward: gradients are averaged over processes in the last micro-batch."""
        if isinstance(self.model, DistributedDataParallel) and micro_batch < self.update_freq - 1:
            return self.model.no_sync()
        return nullcontext()

    def step(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """Update the weights; `loss` is the detached mean over the step's micro-batches.

        Returns:
            device scalars ``grad_norm`` (before clipping) and ``bad`` (1 = skipped).
        """
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.clip_grad or float("inf"))
        finite = norm.isfinite()
        bad = (~finite).float()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # skips the step on overflow, which only lowers the scale
            self.scaler.update()
            bad = (~loss.isfinite()).float()
        elif self.optimizer.defaults.get("fused"):
            # as GradScaler does for fused optimizers
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad  # type: ignore[attr-defined]
            self.optimizer.step()
        elif finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"grad_norm": norm, "bad": bad}

    def state(self) -> dict[str, Any]:
        """Return the state to save in a checkpoint."""
        optimizer = self.optimizer.state_dict() | {"names": self.parameter_names()}
        return {"optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def parameter_names(self) -> list[str]:
        """Return the names of the optimizer's parameters, in its order."""
        names = {parameter: name for name, parameter in self.module.named_parameters()}
        return [names[parameter] for group in self.optimizer.param_groups for parameter in group["params"]]

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Restore the `state` of the checkpoint at `path`; the optimizer keeps the options of this run."""
        saved, own, names = state["optimizer"], self.optimizer.state_dict(), self.parameter_names()
        if "deepspeed" in saved:
            raise ValueError("its optimizer state is DeepSpeed's: go on with --enable_deepspeed")
        before = {name: number for number, name in enumerate(saved.get("names", ()))}
        count = sum(len(group["params"]) for group in saved["param_groups"])
        if before.keys() != set(names) or count != len(names):
            raise ValueError("its optimizer has other parameters")
        moved = {number: before[name] for number, name in enumerate(names)}  # order depends on --layer_decay
        own["state"] = {new: saved["state"][old] for new, old in moved.items() if old in saved["state"]}
        counts = {key: value for key, value in saved["param_groups"][0].items() if key.endswith("step")}
        for group in own["param_groups"]:  # some of timm's optimizers count steps here
            group.update(copy.deepcopy(counts))
        self.optimizer.load_state_dict(own)
        for parameter, values in self.optimizer.state.items():  # torch does not compare shapes
            for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                value = values.get(name)
                if value is not None and value.dim() and value.shape != parameter.shape:  # NovoGrad has scalars
                    raise ValueError(f"{name} is {list(value.shape)} for a weight {list(parameter.shape)}")
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def close(self, folder: str) -> None:
        """After training: restore the plain model and remove unused files from `folder` (DeepSpeed)."""

    def save_shards(self, folder: str, name: str) -> None:
        """Save optimizer state that is sharded (DeepSpeed); called in all processes before a checkpoint is written."""
