"""Fine-tune or probe a SMILE encoder for classification, and test it.

The options are in options_finetune.py, recipes in scripts/finetune/ and scripts/test/.
"""

import argparse
import os
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3

import options
import utils
from checkpoints import BEST, best_of
from datasets_finetune import DATA_SETS, FinetuneDataset, ViewReader, few_shot, severe_subset
from deepspeed_stepper import with_deepspeed
from engine_for_finetuning import BatchAugmentation, WeightedCrossEntropy, balanced_weights, train_one_epoch
from evaluation import Evaluator
from lists import VideoList
from modeling_finetune import MODELS, SIZES, channel_stats
from modeling_image import FrameEncoder, build_encoder
from modeling_probe import ProbedEncoder, ProbeLoss, TokenEncoder
from optim_factory import parameter_groups, pick_precision, share_buffers
from options_finetune import (
    class_names,
    find_problems,
    follow_checkpoint,
    get_args,
    is_probe,
    mixes,
    multi_label,
    num_classes,
    predict_videos,
    read_data_list,
    task,
)
from training import Best
from utils import RunError, logger
from video_transforms_finetune import TrainAugmentation
from weights import load_encoder, load_strictly, local_path


def build_model(args: argparse.Namespace) -> TokenEncoder | ProbedEncoder:
    """Build a classifier, or a frozen encoder with probes; only image encoders come pretrained."""
    probing = is_probe(args)
    encoder: TokenEncoder
    if args.encoder:
        with utils.user_errors("--encoder_"):
            encoder = build_encoder(args.encoder, local_path(args.encoder_weights))
    else:
        classes = 0 if probing or args.knn else num_classes(args)
        rates = (args.drop, args.attn_drop_rate, args.drop_path, args.fc_drop_rate)
        encoder = MODELS[args.model](classes, *rates, args.init_scale, args.use_checkpoint)
    if args.learn == "head":
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(name.startswith(("fc_norm.", "head.")))
    if not probing:
        return encoder
    heads = encoder.num_heads if isinstance(encoder, FrameEncoder) else SIZES[args.model.split("_")[1]].num_heads
    kind, tried = "linear" if args.linear_probe else "attentive", list(product(args.probe_lrs, args.probe_wds))
    return ProbedEncoder(encoder, heads, kind, num_classes(args), tried)


def train_videos(args: argparse.Namespace) -> VideoList:
    """Read the training list, or draw the subset asked for, which is also written to ``train_subset.csv``."""
    data_set = DATA_SETS[args.data_set]
    videos = read_data_list(args, data_set.train_list)
    if args.examples:
        if len(videos) != data_set.train_videos:
            text = "--examples: %s has %d videos, SEVERE draws from %s: not its subset"
            logger.warning(text, videos.source, len(videos), data_set.train_videos or "others")
        videos = severe_subset(videos, args.examples, num_classes(args))
    elif args.samples_per_class or args.num_train_videos:
        with utils.user_errors("--"):
            videos = few_shot(videos, args.seed, args.samples_per_class, args.num_train_videos)
    else:
        return videos
    logger.info("training on %d videos drawn from %s", len(videos), videos.source)
    if args.output_dir and not args.dry_run and utils.rank() == 0:
        videos.write(os.path.join(args.output_dir, "train_subset.csv"))
    return videos


def build_train_set(args: argparse.Namespace) -> FinetuneDataset:
    """Build the dataset of training clips, augmented as the data set allows; for probes, with crops and flips only."""
    data_set, videos = DATA_SETS[args.data_set], train_videos(args)
    policy = "" if is_probe(args) else args.aa
    augment = TrainAugmentation(args.input_size, policy, data_set.flip, args.train_interpolation, args.crop_area)
    clips = (data_set.sampling, args.num_frames, args.sampling_rate, args.num_sample, args.seed, args.reader)
    return FinetuneDataset(videos, task(args).clip_label, augment, *clips)


def build_evaluator(args: argparse.Namespace, device: torch.device) -> Evaluator:
    """Build the evaluator: validation on the centre clip, test on all views of the data set."""
    data_set, frames = DATA_SETS[args.data_set], (args.input_size, args.num_frames, args.sampling_rate)
    views = (args.test_num_segment or data_set.test_segments, args.test_num_crop or data_set.test_crops)
    centre = ViewReader(data_set.sampling, 0, 1, *frames, 0, args.reader)
    every = ViewReader(data_set.sampling, *views, *frames, args.short_side_size, args.reader)
    precision, known = pick_precision(args.precision, device), replace(task(args), names=class_names(args))
    loading = (args.num_workers, args.worker_timeout)
    return Evaluator(device, precision, centre, every, known, *loading, args.output_dir, args.max_bad_fraction)


def build_loss(
    args: argparse.Namespace, norm: tuple[torch.Tensor, torch.Tensor], labels: np.ndarray
) -> tuple[nn.Module, BatchAugmentation]:
    """Build the loss, and the augmentation of batches on the device; for probes, normalisation alone.

    Args:
        labels: of the training videos.
    """
    weights, smoothing = None, args.smoothing
    if args.class_weights == "balanced":
        weights = balanced_weights(labels, num_classes(args)).to(norm[0].device)
    if is_probe(args):
        losses = task(args).losses if weights is None else partial(F.cross_entropy, weight=weights, reduction="none")
        return ProbeLoss(losses), BatchAugmentation(norm)
    eraser = None
    if args.reprob:
        eraser = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=norm[0].device)
    if multi_label(args):
        return nn.BCEWithLogitsLoss(), BatchAugmentation(norm, eraser)
    mixup = None
    if mixes(args):
        draws = (args.mixup_prob, args.mixup_switch_prob, args.mixup_mode)
        soft = {"label_smoothing": smoothing, "num_classes": num_classes(args)}
        mixup = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, *draws, **soft)
        smoothing = 0.0  # Mixup's labels are smoothed already
    return WeightedCrossEntropy(weights, label_smoothing=smoothing), BatchAugmentation(norm, eraser, mixup)


def train(args: argparse.Namespace, device: torch.device, model: nn.Module, evaluator: Evaluator) -> int:
    """Fine-tune or probe `model`, validating as it goes; returns the exit code."""
    output_dir = options.run_options(args).output_dir
    with utils.user_errors():
        dataset, val_videos = build_train_set(args), read_data_list(args, "val.csv")
        report = options.start_video_check(dataset.videos, args)
        sampler = options.make_sampler(args, dataset, args.batch_size)
        if isinstance(model, ProbedEncoder):
            groups = model.parameter_groups(args.lr, args.weight_decay)
        else:
            groups = parameter_groups(model, args.weight_decay, args.layer_decay)
        stepper = options.build_stepper(args, model, groups, device, sampler.steps_per_epoch)
        ema = ModelEmaV3(model, decay=args.model_ema_decay) if args.model_ema else None
        if args.enable_deepspeed:
            stepper = with_deepspeed(stepper, args.zero_stage, args.batch_size * args.num_sample, output_dir)

    best, total_batch = Best(evaluator.task.metric), options.total_batch(args)  # videos, as VideoMAE scales rates
    contents = {"model": model, "args": args, "best": best} | ({"model_ema": ema.module} if ema else {})
    rates = args.probe_lrs if isinstance(model, ProbedEncoder) else [args.lr]
    logger.info(
        "total batch %d videos (%d clips of each), %d steps per epoch, %d epochs, lr %s, %s on %s",
        *(total_batch, args.num_sample, sampler.steps_per_epoch, args.epochs),
        *(", ".join(f"{rate * total_batch / 256:.3g}" for rate in rates), stepper.precision, device),
    )
    run = options.start(args, dataset, sampler, stepper, contents)
    criterion, augment = build_loss(args, channel_stats("imagenet", device), dataset.videos.labels)
    report()
    with run:
        if options.is_finished(args, run.position, best):
            run.stop_epoch = run.position.epoch  # it had stopped early
        for epoch in run.epochs():
            train_one_epoch(stepper.model, criterion, epoch, augment, evaluator.task.train_metrics, ema)
            skipped = args.disable_eval_during_finetuning or (epoch.index + 1) % args.val_freq > 0
            if (epoch.is_last or not skipped) and epoch.save_before_validation():
                share_buffers(model)
                if ema:
                    share_buffers(ema.module)
                metrics = evaluator.validate(ema.module if ema else model, val_videos)
                best.update(epoch, metrics)
                shown = "  ".join(f"{name} {metrics[name]:.2f}" for name in evaluator.task.shown)
                logger.info("validation: %s  (best %.2f in epoch %d)", shown, best.value, best.epoch)
                epoch.is_last |= options.patience_exhausted(args, best, epoch.index)
    stepper.close(output_dir)
    return run.exit_code


def load_for_test(args: argparse.Namespace, model: nn.Module, path: str, key: str = "", prefix: str = "") -> None:
    """Load the weights to test; `key` and `prefix` as in load_encoder.

    Raises:
        RunError: no path, or weights without a head for these classes.
    """
    if not path:
        raise RunError("nothing to test: give --finetune, or an --output_dir with checkpoint-best.pth")
    if isinstance(model, ProbedEncoder) or args.model_ema:
        load_strictly(model, path, key or ("model_ema" if args.model_ema else ""))
    else:
        load_encoder(model, path, need_head=True, key=key, prefix=prefix)


def check(args: argparse.Namespace) -> None:
    """Complete the arguments from the checkpoint, and raise RunError if anything is wrong with them."""
    args.finetune, args.resume = local_path(args.finetune), local_path(args.resume)
    follow_checkpoint(args)
    find_problems(args).raise_if_any()
    if args.enable_deepspeed and args.zero_stage == 0:
        logger.info("--zero_stage 0 shards nothing, like DDP: using stage 1")
        args.zero_stage = 1
    if args.several_labels:
        logger.info("multi-label (%s): binary cross-entropy, mean average precision", args.several_labels)


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Train, test, predict, or vote by nearest neighbours, as the arguments say; returns the exit code."""
    with utils.user_errors():
        evaluator = build_evaluator(args, device)
        model = build_model(args).to(device)
        videos = predict_videos(args) if args.predict else read_data_list(args, "test.csv")
    encoder = model.encoder if isinstance(model, ProbedEncoder) else model
    if args.eval or args.predict:
        report = options.start_video_check(videos, args) if args.eval else None
        load_for_test(args, model, args.finetune or best_of(args.output_dir), args.model_key, args.model_prefix)
        if report:
            report()
        evaluator.test(model, videos, labelled=not args.predict)
        return 0
    if args.finetune:
        load_encoder(encoder, args.finetune, key=args.model_key, prefix=args.model_prefix)
    if args.knn:
        with utils.user_errors():
            neighbours = train_videos(args)
        evaluator.knn(encoder, args.knn, neighbours, videos)
        return 0
    code = train(args, device, model, evaluator)
    if code == 0 and not args.dry_run:
        utils.barrier()  # the first process may still be writing the best checkpoint
        if best := best_of(args.output_dir):
            load_for_test(args, model, best)
        elif args.output_dir:
            logger.warning("no %s in %s: testing the last weights", BEST, args.output_dir)
        evaluator.test(model, videos)
    return code


if __name__ == "__main__":
    options.run_program(get_args(), check, run)
