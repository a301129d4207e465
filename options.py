"""Shared by the programs: command-line options, their validation, and the set-up of a run."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

import utils
from checkpoints import Position, find_resume, lock_folder, restore
from datasets import ChunkSampler, VideoCheck, VideoDataset, build_loader, collate
from lists import VideoList
from optim_factory import DTYPES, Stepper, build_optimizer, cosine_schedule, distribute, pick_precision
from training import Best, Run, RunOptions
from utils import RunError, logger, rank, user_errors, world_size
from video_reader import READERS
from weights import fingerprint, load_strictly, read_checkpoint, stored_options


def make_parser(title: str, text: str) -> argparse.ArgumentParser:
    """Create a parser whose help shows defaults, and that takes no abbreviations."""
    usage, show = "%(prog)s [options]; --help lists them", argparse.ArgumentDefaultsHelpFormatter
    return argparse.ArgumentParser(title, usage, text, allow_abbrev=False, formatter_class=show)


def add_data_arguments(parser: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    """Add the option group `data`; returns its `add_argument`."""
    add = parser.add_argument_group("data").add_argument
    add("--data_root", default="", help="folder that relative paths in the lists start from")
    add("--num_frames", type=int, default=16, help="frames per clip")
    add("--sampling_rate", type=int, default=4, help="stride of the sampled frames")
    add("--input_size", type=int, default=224, help="height and width of clips, pixels")
    add("--reader", choices=READERS, default="pyav", help="video decoder; the released code uses decord")
    add("--num_workers", type=int, default=10, help="data loader workers per GPU")
    add("--pin_mem", action="store_true", default=True, help="load batches into page-locked memory")
    add("--no_pin_mem", action="store_false", dest="pin_mem", help="load batches into ordinary memory")
    add("--worker_timeout", type=float, default=600, help="seconds to wait for a batch before stopping")
    add("--max_bad_fraction", type=float, default=0.05, help="stop if a larger fraction of the videos is unreadable")
    return add


def add_optimizer_arguments(parser: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    """Add the option group `optimizer`; returns its `add_argument`. Programs set the defaults that are missing here."""
    add = parser.add_argument_group("optimizer").add_argument
    add("--update_freq", type=int, default=1, help="forward passes per optimizer step")
    add("--epochs", type=int, help="length of the schedule in passes over the list")
    add("--stop_epoch", type=int, default=0, help="stop after this many epochs without changing the schedule; 0: no")
    add("--start_epoch", type=int, default=0, help="epoch to start from, numbered from 0")
    add("--opt", default="adamw", help="optimizer of timm")
    add("--opt_eps", type=float, default=1e-8, help="epsilon of Adam")
    add("--opt_betas", type=float, nargs=2, help="betas of Adam")
    add("--momentum", type=float, default=0.9, help="momentum of SGD")
    add("--clip_grad", type=float, default=None, help="largest gradient norm; None: no clipping")
    add("--weight_decay", type=float, default=0.05, help="weight decay, except of biases, norms and the mask token")
    add("--weight_decay_end", type=float, default=None, help="weight decay at the end (cosine); None: constant")
    add("--lr", type=float, help="learning rate for a total batch of 256, scaled linearly")
    add("--warmup_lr", type=float, default=0.0, help="learning rate of the first step, scaled likewise")
    add("--min_lr", type=float, help="learning rate of the last step, scaled likewise")
    add("--warmup_epochs", type=int, help="epochs of linear warm-up")
    add("--warmup_steps", type=int, default=-1, help="steps of linear warm-up, if >= 0")
    return add


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option group `run`."""
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="", help="folder for checkpoints, log.txt and bad_clips.txt; empty: none")
    add("--log_dir", default="", help="TensorBoard folder; empty: none")
    add("--log_interval", type=int, default=10, help="steps between console lines")
    add("--save_ckpt_freq", type=int, default=20, help="epochs between numbered checkpoints")
    add("--save_ckpt_minutes", type=float, default=15, help="minutes between saves of checkpoint-latest.pth; 0: never")
    add("--save_ckpt_steps", type=int, default=0, help="steps between saves of checkpoint-latest.pth; 0: never")
    add("--resume", default="", help="checkpoint to resume from")
    add("--auto_resume", action="store_true", default=True, help="resume from the latest checkpoint in output_dir")
    add("--no_auto_resume", action="store_false", dest="auto_resume", help="ignore checkpoints in output_dir")
    add("--seed", type=int, default=0, help="seed of weights, clips and masks")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cuda: the CPU if there is no GPU")
    add("--precision", choices=("auto", *DTYPES), default="auto", help="auto: bf16 or fp16 on a GPU, else fp32")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--dry_run", action="store_true", help="check everything, time a few steps, write nothing")


# Options of VideoMAE's and SMILE's scripts that have no effect here, accepted so that those scripts run unchanged:
# some take no value, some any, some only the value given here. REFUSED ones would change results.
NO_VALUE = ("--dist_on_itp", "--not_dist", "--imagenet_default_mean_and_std", "--dist_eval", "--use_mean_pooling",
            "--save_ckpt", "--resplit", "--model_ema_force_cpu")  # fmt: skip
ANY_VALUE = ("--local_rank", "--local-rank", "--world_size", "--dist_url", "--color_jitter", "--crop_pct",
             "--eval_data_path", "--window_size")  # fmt: skip
ONE_VALUE = {
    "--tubelet_size": ("2", "a token covers 2 frames"),
    "--num_segments": ("1", "a clip is one window of frames"),
    "--num_outputs": ("1", "there is one head"),
    "--normlize_target": ("True", "targets are always normalised"),
}
REFUSED = {"--use_cls": "the encoder has no class token", "--no_save_ckpt": "omit --output_dir to save nothing"}


class Ignored(argparse.Action):
    """Action of an option without effect: appended to `not_needed`, or refused if it would change results."""

    def __call__(self, parser, namespace, values, option_string=None):
        written = f"{option_string} {values or ''}".strip()
        wanted, reason = ONE_VALUE.get(option_string, (values, REFUSED.get(option_string)))
        if option_string in REFUSED or values != wanted:
            parser.error(f"{written} is not supported: {reason}")
        namespace.not_needed.append(written)


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse `argv` (or sys.argv), and accept the options above that the parser does not have itself.

    In the result, `given` names the options that were typed, and `not_needed` holds those without effect.
    """
    argv, known = sys.argv[1:] if argv is None else argv, dict(parser._option_string_actions)
    given = sorted({known[name].dest for word in argv if (name := word.partition("=")[0]) in known})
    for names, nargs in ((NO_VALUE, 0), (ANY_VALUE, None), (ONE_VALUE, None), (REFUSED, 0)):
        for name in filter(lambda name: name not in known, names):
            none = argparse.SUPPRESS
            parser.add_argument(name, action=Ignored, nargs=nargs, dest=none, default=none, help=none)
    return parser.parse_args(argv, argparse.Namespace(given=given, not_needed=[]))


CLIP_OPTIONS = ("num_frames", "sampling_rate", "input_size")
STARTS = ("first_stage_path", "finetune", "encoder", "encoder_weights")  # what a run starts from
# Options that a resumed run may change without a warning: they do not change what it computes, or only its tests.
FREE = {"output_dir", "log_dir", "log_interval", "save_ckpt_freq", "save_ckpt_minutes", "save_ckpt_steps", "resume",
        "auto_resume", "start_epoch", "stop_epoch", "device", "precision", "compile", "dry_run", "num_workers",
        "pin_mem", "worker_timeout", "max_bad_fraction", "data_root", "use_checkpoint", "batch_size",
        "update_freq", "given", "not_needed", "several_labels", "val_freq", "patience",
        "disable_eval_during_finetuning", "short_side_size", "test_num_segment", "test_num_crop",
        "combine_views", "enable_deepspeed", "zero_stage", *STARTS}  # fmt: skip


def trained_with(path: str) -> dict[str, Any]:
    """Read the options of the run that wrote a checkpoint, with `model` the encoder; {} if another program wrote it."""
    stored = dict(stored_options(read_checkpoint(path, whole=False)))
    if "model" in stored:
        stored["model"] = stored["model"].replace("pretrain_videomae_", "vit_")
    return stored


def follow(args: argparse.Namespace, stored: dict[str, Any], source: str, names: Iterable[str]) -> None:
    """Take the options `names` that were not given from `stored`, of the run that wrote `source`; log what differs."""
    unknown = [name for name in CLIP_OPTIONS if name in names and name not in stored and name not in args.given]
    if unknown:
        used = ", ".join(f"--{name} {getattr(args, name)}" for name in unknown)
        logger.info("%s does not hold all options it was trained with; using %s", source, used)
    taken = {name: stored[name] for name in names if name in stored and name not in args.given}
    new = [f"--{name} {value}" for name, value in taken.items() if getattr(args, name) != value]
    vars(args).update(taken)
    if new:
        logger.info("as %s was trained: %s", source, ", ".join(new))
    warn_differences(args, stored, source, names)


def warn_differences(args: argparse.Namespace, stored: dict[str, Any], source: str, names: Iterable[str]) -> str:
    """Warn of the options `names` that differ from those of the run that wrote `source`; returns the text."""
    here = vars(args)
    others = [name for name in names if name in stored and name in here and stored[name] != here[name]]
    text = ", ".join(f"--{name} {stored[name]} (here {here[name]})" for name in others)
    if text:
        logger.warning("%s was trained with %s", source, text)
    return text


def check_start(args: argparse.Namespace, stored: dict[str, Any], source: str) -> None:
    """Note in `args` which weights the run starts from; `stored` are the options of the run that it resumes, if any.

    Raises RunError if that run started from others, wherever their files were.
    """
    before, here = stored.get("start_weights"), {name: value for name in STARTS if (value := getattr(args, name, ""))}
    earlier = re.search(r"\b(?<!sha256:)[0-9a-f]{16}\b", before or "") or (before == "" and stored.get("encoder"))
    if earlier:  # of a version that noted the beginning of the files, and no encoders
        before = None
    contents = lambda name, value: fingerprint(value) if name != "encoder" and os.path.exists(value) else value
    now = " ".join(contents(*start) for start in here.items()) or before or ""
    if before is not None and before != now:
        first = " ".join(filter(None, (stored.get(name, "") for name in STARTS))) or "random weights"
        given = " ".join(here.values())
        raise RunError(f"{source} is of a run that started from {first}, not from {given}: choose another --output_dir")
    args.start_weights = now


class Problems:
    """Errors in a command line, collected to be reported together.

    The constructor checks what the training programs share: numbers, and that output folders can be written.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.found: list[str] = []
        self.numbers(0, "seed", "num_workers", "worker_timeout", "save_ckpt_minutes", "save_ckpt_steps")
        self.numbers(0, "start_epoch", "stop_epoch")
        self.numbers(1, "update_freq", "epochs", "sampling_rate", "log_interval", "save_ckpt_freq")
        for name in filter(lambda name: getattr(args, name), ("output_dir", "log_dir")):
            path = Path(os.path.abspath(getattr(args, name)))
            folder = next(place for place in (path, *path.parents) if os.path.exists(place))
            writable = os.path.isdir(folder) and os.access(folder, os.W_OK)
            self.add({f"--{name} {getattr(args, name)}: {folder} is not a folder that can be written": not writable})

    def add(self, messages: dict[str, Any]) -> None:
        """Add each message whose value is true."""
        self.found += [message for message, wrong in messages.items() if wrong]

    def attempt(self, check: Callable[..., Any], *values: Any, prefix: str = "") -> Any:
        """Return the result of `check`; if it raises, add the message and return None (`prefix`: see user_errors)."""
        try:
            with user_errors(prefix):
                return check(*values)
        except RunError as error:
            self.found.append(str(error))

    def numbers(self, lowest: int, *names: str) -> None:
        """Check that options are at least `lowest`, 0 or 1."""
        limit = "must be at least 1" if lowest else "must not be negative"
        values = {name: getattr(self.args, name) for name in names}
        self.add({f"--{name} {value}: {limit}": value < lowest for name, value in values.items()})

    def files(self, *names: str) -> None:
        """Check that options, if given, name readable files."""
        paths = {name: path for name in names if (path := getattr(self.args, name)) and not os.access(path, os.R_OK)}
        self.found += [f"--{name} {path}: no such file, or not readable" for name, path in paths.items()]

    def raise_if_any(self) -> None:
        """Raise RunError if there are any."""
        if self.found:
            raise RunError("\n       ".join(self.found))


def total_batch(args: argparse.Namespace) -> int:
    """Return the number of clips (or videos, or segments) in an optimizer step, over all processes."""
    return args.batch_size * args.update_freq * world_size()


def build_stepper(
    args: argparse.Namespace, model: nn.Module, groups: list[dict[str, Any]], device: torch.device, steps_per_epoch: int
) -> Stepper:
    """Build optimizer and schedules; learning rates scale with total_batch / 256."""
    lr, warmup_lr, min_lr = (rate * total_batch(args) / 256 for rate in (args.lr, args.warmup_lr, args.min_lr))
    total = args.epochs * steps_per_epoch
    warmup = args.warmup_steps if args.warmup_steps >= 0 else args.warmup_epochs * steps_per_epoch
    if warmup >= total:
        remedy = "lower --warmup_epochs or --warmup_steps"
        logger.warning("the warm-up (%d steps) is not shorter than the schedule (%d steps): %s", warmup, total, remedy)
    end = args.weight_decay if args.weight_decay_end is None else args.weight_decay_end
    rates = (
        lambda step: cosine_schedule(step, lr, min_lr, total, warmup, warmup_lr),
        lambda step: cosine_schedule(step, args.weight_decay, end, total),
    )
    with user_errors("--"):
        optimizer = build_optimizer(groups, args.opt, lr, tuple(args.opt_betas), args.opt_eps, args.momentum)
    precision = pick_precision(args.precision, device)
    return Stepper(model, optimizer, device, precision, args.update_freq, *rates, args.clip_grad)


def run_program(
    args: argparse.Namespace,
    check: Callable[[argparse.Namespace], None],
    run: Callable[[argparse.Namespace, torch.device], int],
    timeout_minutes: float = 30,
) -> None:
    """Join the other processes, check the command line, lock the output folder, seed, run, and exit.

    Args:
        check: completes the arguments; raises RunError if something is wrong with them.
        run: builds and trains or tests; returns the exit code.
        timeout_minutes: how long processes wait for each other.
    """

    def main() -> int:
        device = utils.init_distributed(args.device, timeout_minutes)
        utils.setup_logging()
        if args.not_needed:
            logger.info("ignored, no effect in this code: %s", ", ".join(args.not_needed))
        check(args)
        writes = args.output_dir and rank() == 0 and not getattr(args, "dry_run", False)
        with lock_folder(args.output_dir) if writes else nullcontext():
            utils.seed_everything(getattr(args, "seed", 0))
            return run(args, device)

    utils.run_main(main)


def start_video_check(videos: VideoList, args: argparse.Namespace) -> Callable[[], None]:
    """Start checking some videos in the background, in the first process; call the result to log what was found."""
    return VideoCheck(videos, args.input_size, args.reader).report if rank() == 0 else lambda: None


def make_sampler(args: argparse.Namespace, dataset: VideoDataset, chunk: int) -> ChunkSampler:
    """Share the samples out, in micro-batches of `chunk`. Raises ValueError if they are too few for a step."""
    return ChunkSampler(len(dataset), chunk, args.update_freq, rank(), world_size(), args.seed)


def run_options(args: argparse.Namespace) -> RunOptions:
    """Return the options of the run; a dry run writes nowhere, and logs every step."""
    values = {field.name: getattr(args, field.name) for field in fields(RunOptions)}
    if args.dry_run:
        values |= {"output_dir": "", "log_dir": "", "log_interval": 1}
    return RunOptions(**values)


def is_finished(args: argparse.Namespace, position: Position, best: Best) -> bool:
    """Whether nothing is left to train, by --epochs and --stop_epoch or by --patience."""
    stalled = not position.step and patience_exhausted(args, best, position.epoch - 1)
    return position.epoch >= min(args.stop_epoch or args.epochs, args.epochs) or stalled


def patience_exhausted(args: argparse.Namespace, best: Best, epoch: int) -> bool:
    """Whether the last --patience validations up to `epoch` were no better than those before."""
    return best.epoch >= 0 and 0 < getattr(args, "patience", 0) <= (epoch - best.epoch) // args.val_freq


def start(
    args: argparse.Namespace,
    dataset: VideoDataset,
    sampler: ChunkSampler,
    stepper: Stepper,
    contents: dict[str, Any],
    first_weights: str = "",
    collate: Callable[[list], Any] = collate,
    dynamic: bool | None = False,
) -> Run:
    """Resume if there is a checkpoint, compile and distribute ``contents["model"]``, build the loader; returns the run.

    Args:
        contents: see Run.
        first_weights: checkpoint whose weights are loaded if there is nothing to resume from.
        dynamic: see torch.compile.
    """
    position, model = Position(args.start_epoch), contents["model"]
    found = find_resume(args.output_dir, args.resume, args.auto_resume)
    stored, source = (stored_options(found[1]), str(found[0])) if found else ({}, "")
    check_start(args, stored, source)
    if found:
        position = restore(found, contents, stepper, sampler.layout)
        others = warn_differences(args, stored, source, sorted(vars(args).keys() - FREE))
        if others and "best" in contents and is_finished(args, position, contents["best"]):
            remedy = "take another --output_dir, or raise --epochs (--stop_epoch)"
            raise RunError(f"{source} is of a finished run with {others}: {remedy}")
    elif first_weights:
        load_strictly(model, first_weights)
    if "best" in contents and args.output_dir and not args.dry_run:
        contents["best"].check_file(args.output_dir)
    if args.compile:
        model.compile(dynamic=dynamic)
    if stepper.model is model:  # DeepSpeed has wrapped it otherwise
        stepper.model = distribute(model, stepper.device)
    pin_memory = getattr(args, "pin_mem", False) and stepper.device.type == "cuda"
    loader = build_loader(dataset, sampler, args.num_workers, pin_memory, args.worker_timeout, collate)
    return Run(run_options(args), position, loader, stepper, contents)
