"""What both training programs share around their engines: the steps of an epoch, the loop over epochs, saving,
resuming and stopping.

An engine brings the loss of a batch; a run_*.py brings models, data and options.
"""

import argparse
import datetime
import resource
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Callable, Iterator

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


def restore(found: tuple[Path, dict[str, Any]], model: torch.nn.Module, stepper: Stepper, sampler: ChunkSampler) -> Position:
    """Put a run's checkpoint back into model and stepper.

    Raises:
        RunError: of another model or program, or in mid-epoch with another number of samples a step.
    """
    path, state = found
    missing = {"epoch", "step", "samples_per_step", "meter", "optimizer", "scaler"} - set(state)
    if missing:
        raise RunError(f"{path} holds weights only, nothing to resume from (it lacks {', '.join(sorted(missing))}); "
                       "start from its weights with --first_stage_path or --finetune")
    if state["step"] and state["samples_per_step"] != sampler.samples_per_step:
        raise RunError(f"{path} lies inside an epoch with {state['samples_per_step']} videos a step, now there are "
                       f"{sampler.samples_per_step}: keep GPUs x batch_size x update_freq as they were")
    try:
        model.load_state_dict(checkpoints.model_weights(state, path))
        stepper.load(state, path)
        position = Position(*checkpoints.progress(state), state["meter"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is of another run ({str(error).splitlines()[-1].strip()[:200]})") from error
    logger.info("resuming from %s at epoch %d, step %d", path, position.epoch, position.step)
    return position


def run_steps(batches: Iterator[Batch], loss_of: Callable[[Batch, tuple[int, ...]], Loss], stepper: Stepper,
              meter: StepMeter, first_step: int, chunk_key: Callable[[int, int], tuple[int, ...]],
              after_step: Callable[[int], bool]) -> None:
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


def fit(settings: Settings, position: Position, sampler: ChunkSampler, loader: DataLoader, stepper: Stepper,
        weights: Callable[[], dict[str, Any]], train_epoch: Callable[..., None],
        end_epoch: EndEpoch = lambda epoch, save: ({}, False)) -> int:
    """The loop over epochs.

    Args:
        weights: what checkpoints hold beside optimizer and position, such as ``{'model': …, 'args': …}``.
        train_epoch: (batches, meter, first step, chunk key, after step) → None; the last two as in run_steps.
        end_epoch: called after each epoch in all processes with a function that saves a checkpoint by name; returns
            what the epoch's log line shows besides, and whether to stop.
    Returns:
        Exit code: 0, or EXIT_REQUEUE if a signal stopped the run.
    """
    steps, seed = sampler.steps_per_epoch, settings.seed
    writer = checkpoints.CheckpointWriter(settings.output_dir, settings.save_ckpt_minutes, settings.save_ckpt_steps,
                                          settings.keep_ckpts)
    log = utils.RunLog(settings.output_dir, settings.log_dir, position.epoch, position.epoch * steps + position.step)
    bad = BadFiles(settings.output_dir, settings.max_bad_fraction)
    control = utils.Control()
    stop_epoch = min(settings.stop_epoch or settings.epochs, settings.epochs)

    def save(name: str, epoch: int, step: int, meter: dict) -> bool:
        stepper.save_shards(settings.output_dir, name)
        return writer.save(name, lambda: {
            **weights(), **stepper.state(), "epoch": epoch, "step": step, "samples_per_step": sampler.samples_per_step,
            "meter": meter})

    while position.epoch < stop_epoch:
        epoch, started, told, due = position.epoch, time.time(), False, False
        sampler.set_position(epoch, position.step)
        meter = StepMeter(log, stepper.device, epoch, stop_epoch, steps, settings.log_interval, position.meter)

        def after_step(done: int) -> bool:
            nonlocal told, due
            position.step = done
            told, due = control.agree(writer.due(epoch * steps + done))
            if (told or due) and done < steps:
                meter.flush(done - 1)
                save(checkpoints.LATEST, epoch, done, meter.state())
            return told or settings.dry_run

        batches = bad.watch(epoch_batches(loader, loader.dataset.videos), meter.constants)
        try:
            train_epoch(batches, meter, position.step, lambda step, micro: (seed, epoch, sampler.chunk_id(step, micro)),
                        after_step)
        except RuntimeError as error:  # torch tells of dead workers from a signal handler, wherever that strikes
            if "DataLoader worker" not in str(error):
                raise
            raise loader_failure(error, sampler.issued, loader.dataset.videos) from error
        if settings.dry_run:
            report_dry_run(meter, steps * (stop_epoch - epoch))
            break
        if position.step == steps:
            position = Position(epoch + 1)
            counts = utils.reduce_sum([bad.bad, bad.videos], stepper.device)
            shown, enough = end_epoch(epoch, lambda name: save(name, epoch, 0, {}))
            stop_epoch = epoch + 1 if enough else stop_epoch
            log.epoch({"epoch": epoch, **meter.averages(), **meter.constants, **shown, "bad_clips": counts[0],
                       "steps": steps, "seconds": time.time() - started})
            if (epoch + 1) % settings.save_ckpt_freq == 0 or epoch + 1 == stop_epoch:
                if save(f"checkpoint-{epoch}.pth", epoch, 0, {}):
                    writer.tidy()
            elif told or due:
                save(checkpoints.LATEST, epoch, 0, {})
            bad.check(*counts)
        if told:
            logger.info("told to stop: saved at epoch %d, step %d; the same command goes on", epoch, position.step)
            control.close()
            return utils.EXIT_REQUEUE
    control.close()
    return 0


def report_dry_run(meter: StepMeter, steps: int) -> None:
    """Say how long a run would take at the speed of the one step that was made, and the memory it took."""
    meter.flush(0)
    on_gpu = meter.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    logger.info("dry run: one step went well, nothing was written; peak memory %.1f GiB; %d steps at that speed are %s",
                peak / 2**30, steps, datetime.timedelta(seconds=int(steps * meter.step_time)))
