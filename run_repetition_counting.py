"""Train a SMILE encoder to count repetitions, and test it: UCFRep, the counting cell of the SEVERE benchmark.

``--data_path`` holds the annotations, ``train/*.mat`` and ``val/*.mat``; ``--data_root`` the videos of UCF101 that they
name. As in the benchmark, ``val`` is counted after each epoch, and the best weights are kept. The method is in
modeling_counting.py.
"""

import argparse
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch

import datasets_counting
import modeling_counting as counting
import options
import utils
from checkpoints import best_of
from datasets_counting import SegmentBatch, collate_segments
from evaluation import log_test, stream_samples, write_table
from lists import VideoList
from modeling_counting import Prediction, RepetitionCounter, Walks
from modeling_finetune import MODELS, token_grid
from optim_factory import Stepper, autocast, parameter_groups, pick_precision
from training import Best, Epoch, Step
from utils import RunError, logger
from video_reader import READERS
from weights import check_kind, load_encoder, load_strictly, local_path


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (`argv`, or sys.argv)."""
    parser = options.make_parser("SMILE repetition counting", __doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data_path", default="", help="folder with the annotations train/*.mat and val/*.mat")
    add("--data_root", default="", help="folder with the videos, <class>/<name>.avi or another suffix")
    add("--num_frames", type=int, default=16, help="frames of a window; there is one on each side")
    add("--input_size", type=int, default=224, help="height and width of the frames, pixels")
    add("--segments_per_video", type=int, default=10, help="training segments per video and epoch")
    add("--max_frames", type=int, default=300, help="frames of the longest training segment; two cycles always fit")
    add("--num_workers", type=int, default=4, help="loader processes per GPU")
    add("--worker_timeout", type=float, default=600, help="seconds to wait for a batch before stopping")
    add("--reader", choices=READERS, default="pyav", help="decoder of the videos")
    parser.set_defaults(sampling_rate=1, max_bad_fraction=0.0)  # every frame counts, and so does every video

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, metavar="NAME", default="vit_base_patch16_224", help=", ".join(MODELS))
    add("--finetune", default="", help="checkpoint to start from, or to test with --eval")
    add("--drop_path", type=float, default=0.0, help="stochastic depth rate of the last block")
    add("--use_checkpoint", action="store_true", help="recompute activations to save memory")

    add = options.add_optimizer_arguments(parser)
    add("--batch_size", type=int, default=8, help="training segments per GPU and forward pass")
    add("--refine_steps", type=int, default=11, help="optimizer steps per batch of segments")
    add("--layer_decay", type=float, default=1.0, help="factor on the learning rate per layer, from the top")
    parser.set_defaults(epochs=100, opt="adam", opt_betas=[0.9, 0.999], weight_decay=1e-3)
    parser.set_defaults(lr=4e-4, min_lr=4e-4, warmup_epochs=0)  # 5e-5 for the benchmark's batch of 32, all the way

    add = parser.add_argument_group("validation and test").add_argument
    add("--eval", action="store_true", help="only count val, with --finetune or the best of output_dir")
    add("--val_freq", type=int, default=1, help="epochs between validations")
    options.add_run_arguments(parser)
    return options.parse(parser, argv)


# Training and counting ------------------------------------------------------------------------------------------


def refine(step: Step, model: torch.nn.Module, walks: Walks, num_frames: int, device: torch.device) -> None:
    """Run the forward and backward pass on the current windows, and move the walks by the prediction."""
    classes, boxes = (target.to(device) for target in walks.targets())
    prediction = model(walks.windows(num_frames).to(device))
    loss, parts = counting.counting_loss(prediction, classes, boxes)
    step.backward(loss, **parts)
    walks.move(counting.decode(Prediction(*(values.detach().cpu() for values in prediction)), walks.lengths))


def train_one_epoch(stepper: Stepper, epoch: Epoch, num_frames: int, refine_steps: int) -> None:
    """Train on the steps of an epoch, with `refine_steps` optimizer steps on each batch of segments."""
    stepper.model.train()
    for step in epoch.steps():
        batches = [
            Walks(batch["segments"], [np.random.default_rng(seed) for seed in batch["seeds"]], refine_steps)
            for batch in cast(Iterator[SegmentBatch], step.micro_batches())
        ]
        updates = []
        for _ in range(refine_steps):
            for micro_batch, walks in enumerate(batches):
                with stepper.sync(micro_batch), stepper.autocast():
                    refine(step, stepper.model, walks, num_frames, stepper.device)
            step.update()
            updates.append(step.values)
        step.values = {name: torch.stack([values[name] for values in updates]).mean() for name in step.values}


@torch.inference_mode()
def count_all(
    args: argparse.Namespace, model: RepetitionCounter, device: torch.device
) -> tuple[list[float], dict[str, float]]:
    """Count `val`, each process its share of the videos.

    Returns:
        the count of each video, and the metrics, in all processes.
    Raises:
        RunError: a video cannot be read.
    """
    model.eval()
    videos, precision = read_split(args, "val"), pick_precision(args.precision, device)

    def predict(frames: torch.Tensor, moments: torch.Tensor, lengths: torch.Tensor) -> Prediction:
        parts = []
        for moment, length in zip(moments.split(args.batch_size), lengths.split(args.batch_size)):
            shown = counting.window_frames(moment, length, len(frames), args.num_frames)
            windows = counting.take_frames(frames, shown)
            with autocast(device, precision):
                prediction = model(windows.to(device))
            parts.append(Prediction(*(values.float().cpu() for values in prediction)))
        return Prediction(*(torch.cat(values) for values in zip(*parts)))

    counts, mine = [0.0] * len(videos), range(utils.rank(), len(videos), utils.world_size())
    stream = datasets_counting.WholeSegments(videos, mine, args.input_size, args.reader)
    for sample in stream_samples(stream, args.num_workers, args.worker_timeout):
        if sample["error"]:
            raise RunError(sample["error"])
        frames = sample["frames"]  # uint8 [F, S, S, 3]
        counts[sample["index"]] = counting.count_cycles(partial(predict, frames), len(frames))
    counts = utils.reduce_sum(counts, device)
    return counts, counting.counting_scores(counts, [annotation.cycles for annotation in videos.labels])


def test(args: argparse.Namespace, model: RepetitionCounter, device: torch.device) -> int:
    """Count, log, and write ``test_counts.csv``; returns the exit code."""
    counts, metrics = count_all(args, model, device)
    logger.info("test: mae %.4f  obo %.4f", metrics["mae"], metrics["obo"])
    log_test(args.output_dir, metrics)
    if args.output_dir and utils.rank() == 0:
        videos = read_split(args, "val")
        rows = [[videos.path(i), videos.labels[i].cycles, f"{count:.3f}"] for i, count in enumerate(counts)]
        write_table(Path(args.output_dir) / "test_counts.csv", [["video", "true", "counted"], *rows])
    return 0


# The program ----------------------------------------------------------------------------------------------------


def read_split(args: argparse.Namespace, name: str) -> VideoList:
    """Read the annotations `train` or `val`."""
    return datasets_counting.read_annotations(os.path.join(args.data_path, name), args.data_root)


def find_problems(args: argparse.Namespace) -> options.Problems:
    """Find everything wrong with the arguments that can be seen without building a model."""
    problems = options.Problems(args)
    problems.files("finetune", "resume")
    problems.numbers(1, "segments_per_video", "max_frames", "batch_size", "refine_steps", "val_freq")
    problems.attempt(token_grid, args.num_frames, args.input_size, args.input_size, prefix="--")
    if os.path.exists(args.finetune):
        problems.attempt(check_kind, args.finetune, "blocks.0.attn.qkv.weight", "SMILE or VideoMAE")
    for name in ("val",) if args.eval else ("train", "val"):
        problems.attempt(read_split, args, name)
    problems.add(
        {
            "--dry_run tries a training step: omit it with --eval": args.eval and args.dry_run,
            "--resume continues training: give the weights to test to --finetune": args.eval and args.resume,
        }
    )
    return problems


def train(args: argparse.Namespace, device: torch.device, model: RepetitionCounter) -> int:
    """Train, validating as it goes; returns the exit code."""
    total_batch = options.total_batch(args)
    with utils.user_errors():
        segments = (args.segments_per_video, args.max_frames, args.input_size, args.seed, args.reader)
        dataset = datasets_counting.TrainSegments(read_split(args, "train"), *segments)
        sampler = options.make_sampler(args, dataset, args.batch_size)
        groups = parameter_groups(model.encoder, args.weight_decay, args.layer_decay)
        groups += parameter_groups(model.head, args.weight_decay)
        stepper = options.build_stepper(args, model, groups, device, sampler.steps_per_epoch)
    best = Best("mae", smaller_is_better=True)
    contents = {"model": model, "args": args, "best": best}
    logger.info(
        "total batch %d segments, %d batches an epoch with %d steps each, %d epochs, lr %.3g, %s on %s",
        *(total_batch, sampler.steps_per_epoch, args.refine_steps, args.epochs),
        *(args.lr * total_batch / 256, stepper.precision, device),
    )
    with options.start(args, dataset, sampler, stepper, contents, "", collate_segments, dynamic=None) as run:
        for epoch in run.epochs():
            train_one_epoch(stepper, epoch, args.num_frames, args.refine_steps)
            if (epoch.is_last or (epoch.index + 1) % args.val_freq == 0) and epoch.save_before_validation():
                _, metrics = count_all(args, model, device)
                best.update(epoch, metrics)
                shown = (metrics["mae"], metrics["obo"], best.value, best.epoch)
                logger.info("validation: mae %.4f  obo %.4f  (best mae %.4f in epoch %d)", *shown)
    return run.exit_code


def weights_to_load(args: argparse.Namespace) -> str:
    """Return the checkpoint to start from or, with --eval, to test, where the best of output_dir is the default."""
    return args.finetune or (best_of(args.output_dir) if args.eval else "")


def check(args: argparse.Namespace) -> None:
    """Complete the arguments from the checkpoint, and raise RunError if anything is wrong with them."""
    args.finetune, args.resume = local_path(args.finetune), local_path(args.resume)
    weights = weights_to_load(args)
    if os.path.exists(weights):
        compare = options.follow if args.eval else options.warn_differences
        compare(args, options.trained_with(weights), weights, (*["model"] * args.eval, "num_frames", "input_size"))
    find_problems(args).raise_if_any()


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Build the model, train and test; returns the exit code."""
    encoder = MODELS[args.model](num_classes=0, drop_path_rate=args.drop_path, use_checkpoint=args.use_checkpoint)
    model = RepetitionCounter(encoder).to(device)
    weights = weights_to_load(args)
    if not args.eval:
        if weights:
            load_encoder(model.encoder, weights)
        code = train(args, device, model)
        if code or args.dry_run:
            return code
        utils.barrier()  # the first process may still be writing the best checkpoint
        weights = best_of(args.output_dir)
    if weights:
        load_strictly(model, weights)
    elif args.eval:
        raise RunError("nothing to test: give --finetune, or an --output_dir with checkpoint-best.pth")
    return test(args, model, device)


if __name__ == "__main__":
    options.run_program(get_args(), check, run)
