"""The run around the engines: epochs, steps and micro-batches as iterators.

An engine loops over them and computes the loss. Learning rates, precision, seeds, logging, saving and stopping are
handled here, between iterations. Do not `break` out of the loops: logging and saving after the yield would be skipped.

    with Run(...) as run:
        for epoch in run.epochs():                 # logged and saved when the loop continues
            for step in epoch.steps():             # rates are set before, numbers are logged and saved after
                for batch in step.micro_batches():
                    step.backward(loss)
                step.update()
"""

import math
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

import checkpoints
import utils
from checkpoints import Position
from datasets import Batch, ChunkSampler, VideoDataset
from meters import BadFiles, RunLog, StepMeter, epoch_batches, loader_failure
from optim_factory import Stepper
from utils import logger

DRY_STEPS, WARM_UP = 5, 2  # steps of a dry run; the first ones are not timed because of start-up and compilation


@dataclass(frozen=True)
class RunOptions:
    """Options of a run, with the names and meaning of the flags."""

    output_dir: str
    log_dir: str
    log_interval: int
    batch_size: int
    epochs: int
    stop_epoch: int
    save_ckpt_freq: int
    save_ckpt_minutes: float
    save_ckpt_steps: int
    max_bad_fraction: float
    seed: int
    dry_run: bool


class Best:
    """The best validation so far by one metric, whose weights are in ``checkpoint-best.pth``; saved in checkpoints.

    Args:
        metric: name of a value that is not negative.
    """

    def __init__(self, metric: str, smaller_is_better: bool = False):
        self.metric, self.smaller_is_better, self.epoch = metric, smaller_is_better, -1
        self.value = math.inf if smaller_is_better else -1.0
        self.first = self.state_dict()

    def state_dict(self) -> dict[str, float]:
        """Return the state to save in a checkpoint."""
        return {self.metric: self.value, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Load the state of a checkpoint."""
        self.value, self.epoch = state[self.metric], int(state["epoch"])

    def check_file(self, folder: str) -> None:
        """Rename ``checkpoint-best.pth`` in a folder and begin anew, if its weights are not those of this best."""
        path, other = Path(folder) / checkpoints.BEST, False
        if utils.rank() == 0 and path.is_file():
            try:
                other = checkpoints.read_checkpoint(path, whole=False).get("best") != self.state_dict()
            except utils.RunError:
                other = True
        if other:
            with utils.user_errors():
                path.replace(aside := path.with_suffix(".other.pth"))
            logger.warning("%s is not of what this run resumes: renamed to %s", path, aside.name)
        if utils.broadcast(other):
            self.load_state_dict(self.first)

    def update(self, epoch: "Epoch", metrics: dict[str, float]) -> None:
        """Add the metrics of a validation to the epoch's log, and save the weights if they are the best so far."""
        before, value = self.state_dict(), metrics[self.metric]
        if value < self.value if self.smaller_is_better else value > self.value:
            self.value, self.epoch = value, epoch.index  # before saving, which saves them too
            if not utils.broadcast(epoch.save(checkpoints.BEST)):
                self.load_state_dict(before)
        epoch.shown |= {f"val_{name}": number for name, number in metrics.items()}


class Step:
    """One optimizer step: loop over its micro-batches, then update the weights.

    Attributes:
        number: optimizer steps of the whole run when this one is done.
        rng: generator for what the engine draws for the current micro-batch.
    """

    def __init__(self, epoch: "Epoch", index: int, batches: Iterator[Batch]):
        self.epoch, self.index, self.batches = epoch, index, batches
        self.stepper = epoch.run.stepper
        self.number = epoch.index * epoch.run.steps_per_epoch + index + 1
        self.rng: np.random.Generator
        self.rows: list[dict[str, torch.Tensor]] = []
        self.sources: list[str] = []
        self.values: dict[str, torch.Tensor] = {}

    def micro_batches(self) -> Iterator[Batch]:
        """Yield its batches, with seeded generators and in autocast. Processes average gradients in the last one."""
        for micro_batch in range(self.stepper.update_freq):
            batch = next(self.batches)
            run, epoch = self.epoch.run, self.epoch.index
            # the same for any division of a step into processes and micro-batches
            key = (run.options.seed, epoch, run.sampler.chunk_id(self.index, micro_batch))
            utils.seed_everything(*key)
            self.rng = np.random.default_rng(key)
            self.sources += batch["paths"]
            with self.stepper.sync(micro_batch), self.stepper.autocast():
                yield batch  # the body of the loop runs here

    def backward(self, loss: torch.Tensor, /, **shown: torch.Tensor) -> None:
        """Accumulate the gradient of a micro-batch.

        Args:
            loss: a device scalar.
            shown: other device scalars to log, averaged over the micro-batches; ``loss`` replaces the loss in the log.
        """
        with torch.autocast(loss.device.type, enabled=False):
            self.stepper.backward(loss)
        self.rows.append({"loss": loss.detach(), **shown})

    def update(self) -> None:
        """Update the weights, or skip and log the step if loss or gradient is not finite. May be called repeatedly."""
        rows, self.rows = self.rows, []
        means = {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}
        self.values = means | self.stepper.step(means["loss"])


class Epoch:
    """One pass over the list, starting at the run's position.

    Attributes:
        index: numbered from 0.
        shown: additional values for the epoch's line in the log, such as metrics of a validation.
        is_last: set it to end the run after this epoch.
    """

    def __init__(self, run: "Run"):
        self.run, self.index, self.started = run, run.position.epoch, time.time()
        self.shown: dict[str, Any] = {}
        self.is_last = self.index + 1 == run.stop_epoch
        length, interval = (self.index, run.stop_epoch, run.steps_per_epoch), run.options.log_interval
        self.meter = StepMeter(run.log, run.stepper.device, *length, interval, run.position.meter)
        last = self.index * run.steps_per_epoch + max(0, run.position.step - 1)
        self.meter.constants |= run.stepper.schedule(last)  # for the log, if no steps are left

    def steps(self) -> Iterator[Step]:
        """Yield its optimizer steps, until the run is told to stop."""
        run = self.run
        run.sampler.set_position(self.index, run.position.step)
        loaded = epoch_batches(run.loader, run.videos)
        batches = self.meter.timed(run.bad.watch(loaded, self.meter.constants))
        for index in range(run.position.step, run.steps_per_epoch):
            step = Step(self, index, batches)
            self.meter.constants |= run.stepper.schedule(step.number - 1)
            yield step
            self.meter.update(index, step.values, step.sources)
            run.position.step = index + 1
            if run.save_or_stop(self):
                return

    @property
    def complete(self) -> bool:
        """Whether all steps are done and the run has not been told to stop."""
        return self.run.position.step == self.run.steps_per_epoch and not self.run.stopping

    def save_before_validation(self) -> bool:
        """Save before a long operation such as a validation; returns whether to start it.

        Not in a dry run, after an incomplete epoch, or if told to stop.

        From here to the end of the epoch a signal ends the program at once, without losing anything.
        """
        if self.complete and not self.run.options.dry_run:
            self.run.save(checkpoints.LATEST, self.index, self.run.steps_per_epoch, self.meter.state())
            self.run.stopping = self.run.control.close()
            return not self.run.stopping
        return False

    def save(self, name: str) -> bool:
        """Save a checkpoint at the end of the epoch; returns whether it was written."""
        return self.run.save(name, self.index, 0, self.meter.state(ended=True))


class Run:
    """A training run: its position, and what happens between its steps and epochs. Used in a ``with`` block.

    Args:
        contents: what checkpoints hold besides optimizer and position, such as ``{'model': module, 'args': args}``; of
            objects with a state_dict, their state_dict.
    """

    def __init__(
        self, options: RunOptions, position: Position, loader: DataLoader, stepper: Stepper, contents: dict[str, Any]
    ):
        self.options, self.position, self.loader, self.stepper = options, position, loader, stepper
        self.contents = contents
        assert isinstance(loader.batch_sampler, ChunkSampler) and isinstance(loader.dataset, VideoDataset)
        self.sampler, self.videos = loader.batch_sampler, loader.dataset.videos
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.stop_epoch = min(options.stop_epoch or options.epochs, options.epochs)
        saving = (options.save_ckpt_minutes, options.save_ckpt_steps)
        self.writer = checkpoints.CheckpointWriter(options.output_dir, *saving)
        step = position.epoch * self.steps_per_epoch + position.step
        self.log = RunLog(options.output_dir, options.log_dir, position.epoch, step)
        self.bad = BadFiles(options.output_dir, options.max_bad_fraction)
        self.control = utils.Control()
        self.stopping, self.save_due = False, False
        self.dry_times: list[float] = []  # seconds of the steps of a dry run

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Name the videos of a loader worker that died, which torch reports from a signal handler at any moment."""
        try:
            if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
                raise loader_failure(error, self.sampler.issued, self.videos) from error
        finally:
            self.log.close()

    @property
    def exit_code(self) -> int:
        """0, or EXIT_REQUEUE if a signal stopped the run."""
        return utils.EXIT_REQUEUE if self.stopping else 0

    def epochs(self) -> Iterator[Epoch]:
        """Yield the epochs from the position on; each is logged and saved after the body of the loop."""
        while self.position.epoch < self.stop_epoch and not self.stopping:
            epoch = Epoch(self)
            self.control.listen()
            yield epoch
            if self.options.dry_run:
                self.report_dry_run()
                break
            if epoch.complete:
                self.finish(epoch)
        self.control.close()
        if self.stopping:
            kept = self.options.output_dir and not self.writer.failures
            place = f"epoch {self.position.epoch}, step {self.position.step}"
            text = "saved at %s; run the same command to resume" if kept else "not saved at %s"
            logger.info(f"stopped by a signal: {text}", place)

    def save_or_stop(self, epoch: Epoch) -> bool:
        """After a step, save if due or if told to stop; returns whether the epoch ends here."""
        done = self.position.step
        self.stopping, self.save_due = self.control.agree(self.writer.due(epoch.index * self.steps_per_epoch + done))
        if self.stopping or (self.save_due and done < self.steps_per_epoch):
            epoch.meter.flush(done - 1)
            self.save(checkpoints.LATEST, epoch.index, done, epoch.meter.state())
        if self.options.dry_run:
            self.dry_times.append(epoch.meter.step_time)
        return self.stopping or len(self.dry_times) == DRY_STEPS

    def report_dry_run(self) -> None:
        """Log the memory that a dry run took, and the duration of the whole run at the speed of the last steps."""
        count, timed = len(self.dry_times), self.dry_times[WARM_UP:] or self.dry_times[-1:]
        steps = self.steps_per_epoch * (self.stop_epoch - self.position.epoch) - self.position.step + count
        step, samples = float(np.median(timed)), self.options.batch_size * self.stepper.update_freq * utils.world_size()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if self.stepper.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        logger.info("dry run: %d steps went well, nothing was written; peak memory %.1f GiB", count, peak)
        text = "%.4g s per step (median of the last %d), %.1f samples per second: %d steps would take %.2f hours"
        logger.info(text, step, len(timed), samples / step, steps, steps * step / 3600)

    def finish(self, epoch: Epoch) -> None:
        """Log and save an epoch, and advance the position."""
        self.control.listen()
        self.position = Position(epoch.index + 1, meter=epoch.meter.state(ended=True))
        if epoch.is_last:
            self.stop_epoch = epoch.index + 1
        bad, videos = utils.reduce_sum([self.bad.bad, self.bad.videos], self.stepper.device)
        numbers = epoch.meter.averages() | epoch.meter.constants | epoch.shown
        length = {"bad_clips": bad, "steps": self.steps_per_epoch, "seconds": time.time() - epoch.started}
        self.log.epoch({"epoch": epoch.index} | numbers | length)
        if (epoch.index + 1) % self.options.save_ckpt_freq == 0 or epoch.is_last:
            if epoch.save(f"checkpoint-{epoch.index}.pth"):
                self.writer.tidy()
        elif self.save_due:
            epoch.save(checkpoints.LATEST)
        self.bad.check(bad, videos)

    def save(self, name: str, epoch: int, step: int, meter: dict[str, Any]) -> bool:
        """Save a checkpoint `step` steps into `epoch`, or at its end if 0; returns whether it was written."""
        self.stepper.save_shards(self.options.output_dir, name)
        place = {"epoch": epoch, "step": step, "meter": meter, **self.sampler.layout}

        def checkpoint() -> dict[str, Any]:
            held = dict(self.contents)
            held |= {key: value.state_dict() for key, value in held.items() if hasattr(value, "state_dict")}
            return held | self.stepper.state() | place

        return self.writer.save(name, checkpoint)
