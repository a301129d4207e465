"""The run around the engines: epochs, steps and micro-batches as iterators, with what happens between them.

An engine loops over them and says what is computed. Rates, precision, seeds, logging, saving, stopping and resuming
happen here, as the loop goes round; what comes after a `yield` would not happen if a loop were broken off:

    with Run(...) as run:
        for epoch in run.epochs():                 # logged and saved when the loop comes back
            for step in epoch.steps():             # rates are set before, numbers are logged and saved after
                for batch in step.micro_batches():
                    step.backward(loss)
                step.update()
"""

import fcntl
import itertools
import resource
import signal
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import checkpoints
import utils
from checkpoints import Position
from datasets import Batch, ChunkSampler, VideoDataset
from lists import VideoList
from meters import RunLog, StepMeter
from optim_factory import Stepper
from options import Settings
from utils import RunError, logger

DRY_STEPS, WARM_UP = 5, 2  # steps of a dry run, and how many of them are not timed: start-up and compilation


class Step:
    """One optimizer step: loop over its micro-batches, then update the weights.

    Attributes:
        number: optimizer steps of the whole run when this one is done.
        rng: generator of what the engine draws for the micro-batch in hand.
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
        """Its forward passes: seeded, in autocast; processes exchange gradients with the last one only."""
        for micro_batch in range(self.stepper.update_freq):
            batch = next(self.batches)
            key = self.epoch.run.chunk_key(self.epoch.index, self.index, micro_batch)
            utils.seed_everything(*key)
            self.rng = np.random.default_rng(key)
            self.sources += batch["paths"]
            with self.stepper.sync(micro_batch), self.stepper.autocast():
                yield batch  # the loop's body runs in here

    def backward(self, loss: torch.Tensor, /, **shown: torch.Tensor) -> None:
        """Add a micro-batch's share of the gradient.

        Args:
            loss: a device scalar.
            shown: more of them for the log, averaged over the micro-batches; may replace ``loss`` there.
        """
        with torch.autocast(loss.device.type, enabled=False):
            self.stepper.backward(loss)
        self.rows.append({"loss": loss.detach(), **shown})

    def update(self) -> None:
        """Update the weights, unless loss or gradient is not finite; the log will say so. `backward` may then go on."""
        rows, self.rows = self.rows, []
        means = {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}
        self.values = means | self.stepper.step(means["loss"])


class Epoch:
    """A pass over the list, from the run's position on.

    Attributes:
        index: numbered from 0.
        shown: what the epoch's line in the log holds besides, such as metrics of a validation.
        is_last: set it to end the run after this epoch.
    """

    def __init__(self, run: "Run"):
        self.run, self.index, self.started = run, run.position.epoch, time.time()
        self.shown: dict[str, Any] = {}
        self.is_last = self.index + 1 == run.stop_epoch
        length, interval = (self.index, run.stop_epoch, run.steps_per_epoch), run.settings.log_interval
        self.meter = StepMeter(run.log, run.stepper.device, *length, interval, run.position.meter)
        last = self.index * run.steps_per_epoch + max(0, run.position.step - 1)
        self.meter.constants |= run.stepper.schedule(last)  # for the log, if no step is left

    def steps(self) -> Iterator[Step]:
        """Its optimizer steps, until the run is told to stop."""
        run = self.run
        batches = run.batches(self.meter)
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
        """Whether all its steps are done, and the run goes on."""
        return self.run.position.step == self.run.steps_per_epoch and not self.run.stopping

    def secure(self) -> bool:
        """Before something long, such as a validation: save what has been trained. Whether the run goes on.

        From here to the end of the epoch a signal ends the program at once, and nothing is lost.
        """
        if self.complete and not self.run.settings.dry_run:
            self.run.save(checkpoints.LATEST, self.index, self.run.steps_per_epoch, self.meter.state())
            self.run.stopping = self.run.control.close()
            return not self.run.stopping
        return False

    def save(self, name: str) -> bool:
        """Write a checkpoint of the whole epoch. Whether it was written."""
        return self.run.save(name, self.index, 0, self.meter.state(ended=True))


class Run:
    """A training run: where it stands, and what happens between its steps and epochs. Used in a ``with`` block.

    Args:
        contents: what checkpoints hold beside optimizer and position, such as ``{'model': module, 'args': args}``;
            of modules, their state.
    """

    def __init__(
        self, settings: Settings, position: Position, loader: DataLoader, stepper: Stepper, contents: dict[str, Any]
    ):
        self.settings, self.position, self.loader, self.stepper = settings, position, loader, stepper
        self.contents = contents
        assert isinstance(loader.batch_sampler, ChunkSampler) and isinstance(loader.dataset, VideoDataset)
        self.sampler, self.videos = loader.batch_sampler, loader.dataset.videos
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.stop_epoch = min(settings.stop_epoch or settings.epochs, settings.epochs)
        saving = (settings.save_ckpt_minutes, settings.save_ckpt_steps, settings.keep_ckpts)
        self.writer = checkpoints.CheckpointWriter(settings.output_dir, *saving)
        step = position.epoch * self.steps_per_epoch + position.step
        self.log = RunLog(settings.output_dir, settings.log_dir, position.epoch, step)
        self.bad = BadFiles(settings.output_dir, settings.max_bad_fraction)
        self.control = Control()
        self.stopping, self.save_due = False, False
        self.dry_times: list[float] = []  # seconds of the steps of a dry run

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Name the videos of a dead loader worker: torch tells of it from a signal handler, wherever that strikes."""
        self.log.close()
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # it may tell of the same worker once more
            raise loader_failure(error, self.sampler.issued, self.videos) from error

    @property
    def exit_code(self) -> int:
        """0, or EXIT_REQUEUE if a signal stopped the run."""
        return utils.EXIT_REQUEUE if self.stopping else 0

    def epochs(self) -> Iterator[Epoch]:
        """The epochs from the position on; each is logged and saved when its loop body is done."""
        while self.position.epoch < self.stop_epoch and not self.stopping:
            epoch = Epoch(self)
            self.control.listen()
            yield epoch
            if self.settings.dry_run:
                self.report_dry_run()
                break
            if epoch.complete:
                self.finish(epoch)
        self.control.close()
        if self.stopping:
            place = (self.position.epoch, self.position.step)
            logger.info("told to stop: saved at epoch %d, step %d; the same command goes on", *place)

    def batches(self, meter: StepMeter) -> Iterator[Batch]:
        """The micro-batches of the epoch in hand, from the position on."""
        self.sampler.set_position(self.position.epoch, self.position.step)
        loaded = epoch_batches(self.loader, self.videos)
        return meter.timed(self.bad.watch(loaded, meter.constants))

    def chunk_key(self, epoch: int, step: int, micro_batch: int) -> tuple[int, int, int]:
        """What seeds a forward pass, the same for any division of the same chunks into processes and micro-batches."""
        return self.settings.seed, epoch, self.sampler.chunk_id(step, micro_batch)

    def save_or_stop(self, epoch: Epoch) -> bool:
        """After a step: save if it is time, or if told to stop. Whether the epoch ends here."""
        done = self.position.step
        self.stopping, self.save_due = self.control.agree(self.writer.due(epoch.index * self.steps_per_epoch + done))
        if self.stopping or (self.save_due and done < self.steps_per_epoch):
            epoch.meter.flush(done - 1)
            self.save(checkpoints.LATEST, epoch.index, done, epoch.meter.state())
        if self.settings.dry_run:
            self.dry_times.append(epoch.meter.step_time)
        return self.stopping or len(self.dry_times) == DRY_STEPS

    def report_dry_run(self) -> None:
        """Say what memory a dry run took, and how long the rest of the run takes at the speed of its last steps."""
        count, timed = len(self.dry_times), self.dry_times[WARM_UP:] or self.dry_times[-1:]
        steps = self.steps_per_epoch * (self.stop_epoch - self.position.epoch) - self.position.step + count
        step, clips = float(np.median(timed)), self.settings.batch_size * self.stepper.update_freq * utils.world_size()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if self.stepper.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        logger.info("dry run: %d steps went well, nothing was written; peak memory %.1f GiB", count, peak)
        text = "%.4g s a step (median of the last %d), %.1f clips a second: %d steps would take %.2f hours"
        logger.info(text, step, len(timed), clips / step, steps, steps * step / 3600)

    def finish(self, epoch: Epoch) -> None:
        """Log and save an epoch, and go on to the next."""
        self.control.listen()
        self.position = Position(epoch.index + 1, meter=epoch.meter.state(ended=True))
        if epoch.is_last:
            self.stop_epoch = epoch.index + 1
        bad, videos = utils.reduce_sum([self.bad.bad, self.bad.videos], self.stepper.device)
        numbers = epoch.meter.averages() | epoch.meter.constants | epoch.shown
        length = {"bad_clips": bad, "steps": self.steps_per_epoch, "seconds": time.time() - epoch.started}
        self.log.epoch({"epoch": epoch.index} | numbers | length)
        if (epoch.index + 1) % self.settings.save_ckpt_freq == 0 or epoch.is_last:
            if epoch.save(f"checkpoint-{epoch.index}.pth"):
                self.writer.tidy()
        elif self.save_due:
            epoch.save(checkpoints.LATEST)
        self.bad.check(bad, videos)

    def save(self, name: str, epoch: int, step: int, meter: dict[str, Any]) -> bool:
        """Write a checkpoint: `step` steps into `epoch`, or after it if 0. Whether it was written."""
        self.stepper.save_shards(self.settings.output_dir, name)

        def checkpoint() -> dict[str, Any]:
            held = {
                name: value.state_dict() if isinstance(value, torch.nn.Module) else value
                for name, value in self.contents.items()
            }
            place = {"epoch": epoch, "step": step, "meter": meter, "samples_per_step": self.sampler.samples_per_step}
            return held | self.stepper.state() | place

        return self.writer.save(name, checkpoint)


class Control:
    """What all processes must decide alike after each step: stop (SIGTERM, SIGUSR1 or SIGINT came), or save.

    Processes exchange it on the CPU, one step late, so that no GPU has to wait for it. A second
    SIGINT ends the program at once. Outside of `listen` … `close` a signal ends it at once, with EXIT_REQUEUE.
    """

    def __init__(self):
        self.signal = 0
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._group = utils.cpu_group() if dist.is_initialized() else None

    def listen(self) -> None:
        """From now on take note of signals."""
        for number in utils.STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal == signal.SIGINT == number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = number

    def agree(self, save: bool) -> tuple[bool, bool]:
        """Whether any process was told to stop, and whether any wants to save; several say so one step late."""
        if self._group is None:
            return bool(self.signal), save
        before = self._finish()
        flags = torch.tensor([float(self.signal != 0), float(save)])
        self._pending = (dist.all_reduce(flags, group=self._group, async_op=True), flags)
        return before

    def close(self) -> bool:
        """Stop listening. Whether any process has been told to stop by now."""
        utils.leave_on_signal()
        self._finish()
        return utils.reduce_sum([float(self.signal != 0)], torch.device("cpu"), self._group)[0] > 0

    def _finish(self) -> tuple[bool, bool]:
        """The outcome of the exchange under way."""
        if self._pending is None:
            return False, False
        work, flags = self._pending
        work.wait()
        self._pending = None
        return bool(flags[0]), bool(flags[1])


# What goes wrong with data --------------------------------------------------------------------------------------


def last_line(error: Exception) -> str:
    """The end of a message, which may hold a worker's traceback before it; the name of an error without a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def loader_failure(error: Exception, issued: deque[list[int]], videos: VideoList, hung: int = 1) -> RunError:
    """What to tell of a worker that hung or died: the videos of its batches.

    Args:
        issued: videos of each batch that is on its way, the one that is waited for first.
        hung: how many of these batches a worker that hangs may have.
    """
    hangs = "timed out" in str(error)
    flying = itertools.islice(issued, hung if hangs else None)  # one that died need not be the one waited for
    lost = ", ".join(videos.path(index) for indices in flying for index in indices)
    return RunError(
        f"the data loader failed ({last_line(error)}) on one of: {lost}; take it off "
        "the list, or raise --worker_timeout if storage is slow"
    )


def epoch_batches(loader: DataLoader, videos: VideoList) -> Iterator[Batch]:
    """The batches of the sampler's epoch; a worker that hangs or dies is reported with the videos it had.

    Raises:
        RunError: a worker hung, died, or raised.
    """
    assert isinstance(loader.batch_sampler, ChunkSampler)
    issued = loader.batch_sampler.issued
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RunError as error:  # raised in a worker, whose traceback comes along
            raise RunError(last_line(error).removeprefix("utils.RunError: ")) from error
        except (RuntimeError, OSError, EOFError) as error:  # hung, died, or died while handing over
            raise loader_failure(error, issued, videos) from error
        issued.popleft()
        yield batch


class BadFiles:
    """Notes files that could not be used, each once, in ``bad_clips.txt``, and stops a run that has too many.

    Processes append to the same file under a lock.
    """

    def __init__(self, output_dir: str, max_fraction: float):
        self.file = Path(output_dir) / "bad_clips.txt" if output_dir else None
        self.max_fraction, self.videos, self.bad = max_fraction, 0, 0
        self.noted: set[str] = set()
        self.first: list[str] = []

    def watch(self, batches: Iterator[Batch], shown: dict[str, float]) -> Iterator[Batch]:
        """Pass batches on, taking note of their bad files and counting the videos among them in `shown`.

        Raises:
            RunError: more than `max_fraction` of the videos, once this process has tried 100.
        """
        for batch in batches:
            self.videos += len(batch["paths"]) + batch["num_bad_videos"]
            self.bad += batch["num_bad_videos"]
            for path, reason in batch["bad"]:
                if path not in self.noted:
                    self.note(path, reason)
            if self.bad:
                shown["bad_clips"] = self.bad
            if self.videos >= 100:
                self.check(self.bad, self.videos)
            yield batch

    def check(self, bad: float, videos: float) -> None:
        """Raise RunError if too large a part of the videos could not be read."""
        if bad > self.max_fraction * videos:
            raise RunError(
                f"{bad:.0f} of {videos:.0f} videos could not be read, more than --max_bad_fraction "
                f"{self.max_fraction}; the first: {'; '.join(self.first)}"
            )

    def note(self, path: str, reason: str) -> None:
        """Write a line, unless some process has written it."""
        line = f"{path}\t{reason}".replace("\n", " ")
        self.noted.add(path)
        self.first = [*self.first, f"{path}: {reason}"][:3]
        logger.warning("cannot use %s: %s", path, reason)
        if not self.file:
            return
        try:
            with open(self.file, "a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                if path not in (noted.split("\t")[0] for noted in file.read().splitlines()):
                    file.write(line + "\n")
        except OSError as error:
            logger.warning("could not write to %s (%s)", self.file, error.strerror)
