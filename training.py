"""What both training programs share around their engines: the steps of an epoch, the loop over epochs, saving,
resuming and stopping.

An engine brings the loss of a batch; a run_*.py brings models, data and options.
"""

import argparse
import datetime
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import checkpoints
import utils
from data_loading import BadFiles, ChunkSampler, epoch_batches, loader_failure
from datasets import Batch
from optim_factory import Stepper
from utils import RunError, StepMeter, logger

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]  # and device scalars for the log
EndEpoch = Callable[[int, Callable[[str], bool]], tuple[dict[str, Any], bool]]


@dataclass(frozen=True)
class Settings:
    """The options of a run that the loop needs; names and meaning are those of the flags."""

    output_dir: str
    log_dir: str
    log_interval: int
    epochs: int
    stop_epoch: int
    save_ckpt_freq: int
    save_ckpt_minutes: float
    save_ckpt_steps: int
    keep_ckpts: int
    max_bad_fraction: float
    seed: int
    dry_run: bool

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Settings":
        """Taken from parsed arguments; a dry run writes nowhere."""
        values = {field.name: getattr(args, field.name) for field in fields(cls)}
        if args.dry_run:
            values |= {"output_dir": "", "log_dir": ""}
        return cls(**values)


@dataclass
class Position:
    """Where a run goes on: an epoch, optimizer steps done in it, and the meter's state there."""

    epoch: int = 0
    step: int = 0
    meter: dict | None = None


def distribute(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """DDP around a model, if there are several processes."""
    if utils.world_size() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def share_buffers(model: torch.nn.Module) -> None:
    """Give all processes the first one's buffers: each has running statistics of its own part of the data."""
    if utils.world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def restore(
    found: tuple[Path, dict[str, Any]], model: torch.nn.Module, stepper: Stepper, sampler: ChunkSampler
) -> Position:
    """Put a run's checkpoint back into model and stepper.

    Raises:
        RunError: of another model or program, or in mid-epoch with another number of samples a step.
    """
    path, state = found
    position = Position(*checkpoints.progress(state, path), state.get("meter"))
    missing = {"epoch", "step", "samples_per_step", "meter", "optimizer", "scaler"} - set(state)
    if missing:
        raise RunError(
            f"{path} holds weights only, nothing to resume from (it lacks {', '.join(sorted(missing))}); "
            "start from its weights with --first_stage_path or --finetune"
        )
    if state["step"] and state["samples_per_step"] != sampler.samples_per_step:
        raise RunError(
            f"{path} lies inside an epoch with {state['samples_per_step']} videos a step, now there are "
            f"{sampler.samples_per_step}: keep GPUs x batch_size x update_freq as they were"
        )
    try:
        model.load_state_dict(checkpoints.model_weights(state, path))
        stepper.load(state, path)
        if not isinstance(position.meter, dict):
            raise ValueError("its meter holds no sums")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is of another run ({str(error).splitlines()[-1].strip()[:200]})") from error
    logger.info("resuming from %s at epoch %d, step %d", path, position.epoch, position.step)
    return position


def run_steps(
    batches: Iterator[Batch],
    loss_of: Callable[[Batch, tuple[int, ...]], Loss],
    stepper: Stepper,
    meter: StepMeter,
    first_step: int,
    chunk_key: Callable[[int, int], tuple[int, ...]],
    after_step: Callable[[int], bool],
) -> None:
    """The optimizer steps of an epoch, from `first_step` on.

    Args:
        batches: `stepper.update_freq` micro-batches a step.
        loss_of: loss of a micro-batch, given the key that seeds what it draws.
        chunk_key: (step, micro-batch) → that key.
        after_step: called with the number of steps done in this epoch; True ends it there.
    """
    batches = meter.timed(batches)
    for step in range(first_step, meter.steps_per_epoch):
        meter.constants |= stepper.schedule(meter.epoch * meter.steps_per_epoch + step)
        rows: list[dict[str, torch.Tensor]] = []
        sources: list[str] = []
        for micro_batch in range(stepper.update_freq):
            batch, key = next(batches), chunk_key(step, micro_batch)
            utils.seed_everything(*key)
            with stepper.sync(micro_batch):
                with stepper.autocast():
                    loss, shown = loss_of(batch, key)
                stepper.backward(loss)
            rows.append({"loss": loss.detach(), **shown})
            sources += batch["paths"]
        means = {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}
        meter.update(step, means | stepper.step(means["loss"]), sources)
        if after_step(step + 1):
            return


class TrainingLoop:
    """The loop over epochs: saving, logging, stopping.

    Args:
        weights: what checkpoints hold beside optimizer and position, such as ``{'model': …, 'args': …}``.
        train_epoch: (batches, meter, first step, chunk key, after step) → None; the last two as in run_steps.
        end_epoch: if given, called after each epoch in all processes with a function that saves a checkpoint by name; returns
            what the epoch's log line shows besides, and whether to stop.
    """

    def __init__(
        self,
        settings: Settings,
        position: Position,
        sampler: ChunkSampler,
        loader: DataLoader,
        stepper: Stepper,
        weights: Callable[[], dict[str, Any]],
        train_epoch: Callable[..., None],
        end_epoch: EndEpoch | None = None,
    ):
        self.settings, self.position, self.sampler, self.loader = settings, position, sampler, loader
        self.stepper, self.weights, self.train_epoch, self.end_epoch = stepper, weights, train_epoch, end_epoch
        self.steps = sampler.steps_per_epoch
        self.stop_epoch = min(settings.stop_epoch or settings.epochs, settings.epochs)
        self.writer = checkpoints.CheckpointWriter(
            settings.output_dir, settings.save_ckpt_minutes, settings.save_ckpt_steps, settings.keep_ckpts
        )
        self.log = utils.RunLog(
            settings.output_dir, settings.log_dir, position.epoch, position.epoch * self.steps + position.step
        )
        self.bad = BadFiles(settings.output_dir, settings.max_bad_fraction)
        self.control = utils.Control()
        self.told, self.due = False, False  # to stop, to save

    def run(self) -> int:
        """Train to the end; returns the exit code: 0, or EXIT_REQUEUE if a signal stopped the run."""
        while self.position.epoch < self.stop_epoch and not self.told:
            started, epoch = time.time(), self.position.epoch
            meter = StepMeter(
                self.log,
                self.stepper.device,
                epoch,
                self.stop_epoch,
                self.steps,
                self.settings.log_interval,
                self.position.meter,
            )
            self.control.listen()
            self.train(meter)
            if self.settings.dry_run:
                report_dry_run(meter, self.steps * (self.stop_epoch - epoch))
                break
            if self.position.step == self.steps and not self.told:
                self.finish_epoch(meter, started)
        self.control.close()
        if self.told:
            logger.info(
                "told to stop: saved at epoch %d, step %d; the same command goes on",
                self.position.epoch,
                self.position.step,
            )
        return utils.EXIT_REQUEUE if self.told else 0

    def train(self, meter: StepMeter) -> None:
        """The steps of an epoch, from the position on, to its end or until told to stop."""
        epoch, sampler, videos = meter.epoch, self.sampler, self.loader.dataset.videos
        sampler.set_position(epoch, self.position.step)
        meter.constants |= self.stepper.schedule(
            epoch * self.steps + max(0, self.position.step - 1)
        )  # if no step is left

        def after_step(done: int) -> bool:
            self.position.step = done
            self.told, self.due = self.control.agree(self.writer.due(epoch * self.steps + done))
            if self.told or (self.due and done < self.steps):
                meter.flush(done - 1)
                self.save(checkpoints.LATEST, epoch, done, meter.state())
            return self.told or self.settings.dry_run

        batches = self.bad.watch(epoch_batches(self.loader, videos), meter.constants)
        try:
            self.train_epoch(
                batches,
                meter,
                self.position.step,
                lambda step, micro: (self.settings.seed, epoch, sampler.chunk_id(step, micro)),
                after_step,
            )
        except RuntimeError as error:  # torch tells of dead workers from a signal handler, wherever that strikes
            if "DataLoader worker" not in str(error):
                raise
            raise loader_failure(error, sampler.issued, videos) from error

    def finish_epoch(self, meter: StepMeter, started: float) -> None:
        """Validate, log, save, and go on to the next epoch."""
        epoch, state = meter.epoch, meter.state(ended=True)
        shown, enough = {}, False
        if self.end_epoch:
            self.save(checkpoints.LATEST, epoch, self.steps, meter.state())  # a signal ends a validation at once
            self.told, _ = self.control.close()
            if self.told:
                return
            shown, enough = self.end_epoch(epoch, lambda name: self.save(name, epoch, 0, state))
            self.control.listen()
        self.position = Position(epoch + 1, meter=state)
        counts = utils.reduce_sum([self.bad.bad, self.bad.videos], self.stepper.device)
        self.stop_epoch = epoch + 1 if enough else self.stop_epoch
        self.log.epoch(
            {
                "epoch": epoch,
                **meter.averages(),
                **meter.constants,
                **shown,
                "bad_clips": counts[0],
                "steps": self.steps,
                "seconds": time.time() - started,
            }
        )
        if (epoch + 1) % self.settings.save_ckpt_freq == 0 or epoch + 1 == self.stop_epoch:
            if self.save(f"checkpoint-{epoch}.pth", epoch, 0, state):
                self.writer.tidy()
        elif self.due:
            self.save(checkpoints.LATEST, epoch, 0, state)
        self.bad.check(*counts)

    def save(self, name: str, epoch: int, step: int, meter: dict) -> bool:
        """Write a checkpoint: `step` steps into `epoch`, or after it if 0. Whether it was written."""
        self.stepper.save_shards(self.settings.output_dir, name)
        return self.writer.save(
            name,
            lambda: {
                **self.weights(),
                **self.stepper.state(),
                "epoch": epoch,
                "step": step,
                "samples_per_step": self.sampler.samples_per_step,
                "meter": meter,
            },
        )


def report_dry_run(meter: StepMeter, steps: int) -> None:
    """Say how long a run would take at the speed of the one step that was made, and the memory it took."""
    meter.flush(0)
    on_gpu = meter.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    logger.info(
        "dry run: one step went well, nothing was written; peak memory %.1f GiB; %d steps at that speed are %s",
        peak / 2**30,
        steps,
        datetime.timedelta(seconds=int(steps * meter.step_time)),
    )
