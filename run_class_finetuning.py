"""Fine-tune or probe a SMILE encoder for classification, and test it: the command line and what is built from it.

scripts/finetune/ and scripts/test/ hold the recipes. Without further flags it fine-tunes, then tests the best
checkpoint on all views; ``--eval``, ``--predict`` and ``--knn`` do no training.
"""

import argparse
import os
from itertools import product

import torch
import torch.nn as nn
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3

import options
import utils
from checkpoints import Position, check_kind, find_resume, load_encoder, load_strictly, local_path, lock_folder, restore
from datasets import ChunkSampler, SpeedCheck, VideoList, build_loader
from datasets_finetune import DATA_SETS, FinetuneDataset, ViewReader, few_shot, read_class_names
from deepspeed_stepper import with_deepspeed
from engine_for_finetuning import BatchAugmentation, train_one_epoch
from evaluation import Evaluator
from modeling_finetune import MODELS, SIZES, VisionTransformer, token_grid
from modeling_probe import ProbedEncoder, ProbeLoss
from optim_factory import Stepper, distribute, parameter_groups, share_buffers
from options import Problems, Settings
from training import Epoch, Run
from utils import RunError, logger
from video_transforms_finetune import TrainAugmentation

BEST = "checkpoint-best.pth"


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (`argv`, or sys.argv)."""
    parser = options.make_parser("SMILE fine-tuning", __doc__)

    data = options.add_data_arguments(parser)
    decides = "decides classes, flip, sampling and test views; `custom` needs --nb_classes"
    data.add_argument("--data_set", choices=DATA_SETS, default="Kinetics-400", help=decides)
    data.add_argument("--data_path", default="", help="folder with train.csv, val.csv, test.csv (and classes.txt)")
    data.add_argument("--nb_classes", type=int, default=0, help="classes; 0: the data set's")
    data.add_argument("--num_sample", type=int, default=1, help="augmentations of each decoded clip")
    data.add_argument("--samples_per_class", type=int, default=0, help="train on so many videos a class; 0: all")
    data.add_argument("--num_train_videos", type=int, default=0, help="train on so many videos; 0: all")

    model = parser.add_argument_group("model")
    names = ", ".join(MODELS)
    model.add_argument("--model", choices=MODELS, metavar="NAME", default="vit_base_patch16_224", help=names)
    model.add_argument("--finetune", default="", help="checkpoint to start from, or to test with --eval")
    model.add_argument("--model_key", default="", help="where its weights are, such as `model|module`; '': look")
    model.add_argument("--model_prefix", default="", help="what their names begin with; encoder. is found anyway")
    model.add_argument("--drop", type=float, default=0.0, help="dropout in the blocks")
    model.add_argument("--attn_drop_rate", type=float, default=0.0, help="dropout of attention")
    model.add_argument("--drop_path", type=float, default=0.1, help="stochastic depth rate of the last block")
    model.add_argument("--fc_drop_rate", type=float, default=0.0, help="dropout before the head")
    model.add_argument("--init_scale", type=float, default=0.001, help="factor on the head's initial weights")
    model.add_argument("--use_checkpoint", action="store_true", help="recompute activations to save memory")
    model.add_argument("--model_ema", action="store_true", help="also keep, and validate, an average of the weights")
    model.add_argument("--model_ema_decay", type=float, default=0.9999, help="of that average")

    augment = parser.add_argument_group("augmentation")
    augment.add_argument("--aa", default="rand-m7-n4-mstd0.5-inc1", help="timm RandAugment policy; '' for none")
    filters = ("bilinear", "bicubic", "random")
    augment.add_argument("--train_interpolation", choices=filters, default="bicubic", help="of RandAugment's turns")
    area = "smallest share of the frame's area that a random crop keeps"
    augment.add_argument("--crop_area", type=float, default=0.25, help=area)
    augment.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    augment.add_argument("--mixup", type=float, default=0.8, help="alpha; 0: off")
    augment.add_argument("--cutmix", type=float, default=1.0, help="alpha; 0: off")
    augment.add_argument("--cutmix_minmax", type=float, nargs=2, help="share of the side pasted, in place of alpha")
    augment.add_argument("--mixup_prob", type=float, default=1.0, help="of either")
    augment.add_argument("--mixup_switch_prob", type=float, default=0.5, help="of CutMix, where both are on")
    augment.add_argument("--mixup_mode", choices=("batch", "pair", "elem"), default="batch", help="drawn once for what")
    augment.add_argument("--reprob", type=float, default=0.25, help="random erasing, probability")
    augment.add_argument("--remode", choices=("const", "rand", "pixel"), default="pixel", help="filling of the erased")
    augment.add_argument("--recount", type=int, default=1, help="random erasing, rectangles")

    optim = options.add_optimizer_arguments(parser)
    optim.add_argument("--batch_size", type=int, default=4, help="videos a GPU and forward pass")
    optim.add_argument("--layer_decay", type=float, default=0.75, help="factor on the rate, a layer down")
    parser.set_defaults(epochs=100, opt_betas=[0.9, 0.999], lr=1e-3, min_lr=1e-6, warmup_epochs=5)

    frozen = parser.add_argument_group("frozen evaluation")
    frozen.add_argument("--linear_probe", action="store_true", help="train linear classifiers on the frozen encoder")
    frozen.add_argument("--attentive_probe", action="store_true", help="the same, pooling with learned attention")
    frozen.add_argument("--probe_lrs", type=float, nargs="+", default=[1e-2, 3e-3, 1e-3], help="rates tried together")
    frozen.add_argument("--probe_wds", type=float, nargs="+", default=[0.0, 0.05], help="weight decays tried together")
    frozen.add_argument("--knn", type=int, default=0, metavar="K", help="test K nearest neighbours, without training")

    test = parser.add_argument_group("validation and test")
    test.add_argument("--eval", action="store_true", help="only test --finetune (or output_dir's best)")
    test.add_argument("--predict", default="", metavar="VIDEO", help="print the five likeliest classes of one video")
    test.add_argument("--val_freq", type=int, default=1, help="epochs between validations")
    test.add_argument("--disable_eval_during_finetuning", action="store_true", help="validate after the last epoch")
    test.add_argument("--patience", type=int, default=0, help="stop after so many validations without a best; 0: never")
    test.add_argument("--short_side_size", type=int, default=0, help="resize test videos to it; 0: the input size")
    test.add_argument("--test_num_segment", type=int, default=0, help="views in time; 0: the data set's")
    test.add_argument("--test_num_crop", type=int, default=0, help="views in space; 0: the data set's")

    options.add_run_arguments(parser)
    deepspeed = parser.add_argument_group("DeepSpeed")
    deepspeed.add_argument("--enable_deepspeed", action="store_true", help="fine-tune with DeepSpeed in place of DDP")
    stages = "what processes share out: 0 nothing, 1 optimizer state, 2 gradients too"
    deepspeed.add_argument("--zero_stage", type=int, choices=(0, 1, 2), default=0, help=stages)
    return options.parse(parser, argv)


def read_list(args: argparse.Namespace, name: str) -> VideoList:
    """The list `name` of the data set, labels checked."""
    return VideoList(os.path.join(args.data_path, name), num_classes(args), args.data_root)


def num_classes(args: argparse.Namespace) -> int:
    """Number of classes, from the flag or the data set; 0 if neither says."""
    return args.nb_classes or DATA_SETS[args.data_set].num_classes or 0


def class_names(args: argparse.Namespace) -> list[str] | None:
    """The lines of classes.txt, if there is one."""
    return read_class_names(args.data_path, num_classes(args)) if args.data_path else None


def is_probe(args: argparse.Namespace) -> bool:
    """Whether probes are trained on a frozen encoder."""
    return args.linear_probe or args.attentive_probe


def find_problems(args: argparse.Namespace) -> Problems:
    """Everything wrong with the arguments that can be seen without building a model."""
    problems, probe = Problems(args), is_probe(args)
    problems.files("finetune", "resume", "predict")
    problems.numbers(0, "knn", "test_num_segment", "test_num_crop", "samples_per_class", "num_train_videos")
    side = args.short_side_size
    problems.when(0 < side < args.input_size, f"--short_side_size {side}: smaller than --input_size")
    problems.numbers(1, "batch_size", "num_sample", "val_freq")

    if os.path.isfile(args.finetune):
        problems.attempt(check_kind, args.finetune, "blocks.0.attn.qkv.weight", "SMILE or VideoMAE")
    problems.attempt(token_grid, args.num_frames, args.input_size, args.input_size)
    problems.attempt(TrainAugmentation, args.input_size, args.aa, False, args.train_interpolation, args.crop_area)
    known = DATA_SETS[args.data_set].num_classes
    if not num_classes(args):
        problems.when(True, f"--data_set {args.data_set} needs --nb_classes")
    elif known and args.nb_classes not in (0, known):
        problems.when(True, f"--nb_classes {args.nb_classes}: {args.data_set} has {known} classes")
    else:
        problems.attempt(class_names, args)
        for name in needed_lists(args):
            problems.attempt(lambda name=name: read_list(args, name).check_files(args.max_bad_fraction))
    odd = args.batch_size * args.num_sample % 2 == 1
    problems.when(
        odd and mixes(args), f"--batch_size {args.batch_size}: Mixup and CutMix need an even number of clips a batch"
    )

    evaluates = bool(args.eval or args.predict)
    problems.when(
        args.dry_run and (evaluates or args.knn > 0),
        "--dry_run tries a training step: leave it with --eval, --predict and --knn",
    )
    problems.when(args.linear_probe and args.attentive_probe, "--linear_probe and --attentive_probe: choose one")
    problems.when(
        args.knn > 0 and (evaluates or probe),
        "--knn is a test of its own: give it without --eval, --predict and probes",
    )
    problems.when(
        (probe or args.knn > 0) and not (args.finetune or args.eval), "a frozen encoder needs weights: give --finetune"
    )
    if probe:
        problems.when(
            bool(args.clip_grad), "--clip_grad would couple the probes that are trained side by side: leave it"
        )
        problems.when(
            min(args.weight_decay, args.lr) <= 0,
            "probes take lr and weight decay from --probe_lrs and --probe_wds; leave --lr and --weight_decay",
        )
    return problems


def needed_lists(args: argparse.Namespace) -> list[str]:
    """Which lists the chosen job reads."""
    train = DATA_SETS[args.data_set].train_list
    if args.predict:
        return []
    if args.eval:
        return ["test.csv"]
    return [train, "test.csv"] if args.knn else [train, "val.csv", "test.csv"]


def mixes(args: argparse.Namespace) -> bool:
    """Whether batches are mixed: not for probes."""
    return bool(args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax) and not (is_probe(args) or args.knn)


def build_model(args: argparse.Namespace) -> VisionTransformer | ProbedEncoder:
    """Classifier, or frozen encoder with probes; new weights."""
    probing = is_probe(args)
    model = MODELS[args.model](
        num_classes=0 if probing or args.knn else num_classes(args),
        drop_rate=args.drop,
        attn_drop_rate=args.attn_drop_rate,
        drop_path_rate=args.drop_path,
        fc_drop_rate=args.fc_drop_rate,
        init_scale=args.init_scale,
        use_checkpoint=args.use_checkpoint,
    )
    if not probing:
        return model
    heads = next(size.num_heads for name, size in SIZES.items() if f"_{name}_" in args.model)
    return ProbedEncoder(
        model,
        heads,
        "linear" if args.linear_probe else "attentive",
        num_classes(args),
        list(product(args.probe_lrs, args.probe_wds)),
    )


def train_videos(args: argparse.Namespace) -> VideoList:
    """The training list, or the part of it that was asked for, which is also written to ``train_subset.csv``."""
    videos = read_list(args, DATA_SETS[args.data_set].train_list)
    if args.samples_per_class or args.num_train_videos:
        videos = few_shot(videos, args.seed, args.samples_per_class, args.num_train_videos)
        if args.output_dir and not args.dry_run and utils.rank() == 0:
            videos.write(os.path.join(args.output_dir, "train_subset.csv"))
    return videos


def build_train_set(args: argparse.Namespace) -> FinetuneDataset:
    """Training clips, augmented as the data set allows; probes see crops and flips only."""
    data_set, videos = DATA_SETS[args.data_set], train_videos(args)
    policy = "" if is_probe(args) else args.aa
    augment = TrainAugmentation(args.input_size, policy, data_set.flip, args.train_interpolation, args.crop_area)
    return FinetuneDataset(
        videos, augment, data_set.sampling, args.num_frames, args.sampling_rate, args.num_sample, args.seed
    )


def view_reader(args: argparse.Namespace, test: bool) -> ViewReader:
    """The views of a test, or the one of a validation."""
    data_set = DATA_SETS[args.data_set]
    views = (args.test_num_segment or data_set.test_segments, args.test_num_crop or data_set.test_crops)
    segments, crops = views if test else (0, 1)
    short_side = args.short_side_size if test else 0
    frames = (args.num_frames, args.sampling_rate)
    return ViewReader(data_set.sampling, segments, crops, args.input_size, *frames, short_side)


def build_evaluator(args: argparse.Namespace, device: torch.device) -> Evaluator:
    """What validates and tests on the lists of the data set."""
    return Evaluator(
        device=device,
        precision=options.pick_precision(args.precision, device),
        num_classes=num_classes(args),
        read_list=lambda name: read_list(args, name),
        val_views=view_reader(args, test=False),
        test_views=view_reader(args, test=True),
        num_workers=args.num_workers,
        timeout=args.worker_timeout,
        output_dir=args.output_dir,
        classes=class_names(args),
    )


def build_loss(
    args: argparse.Namespace, norm: tuple[torch.Tensor, torch.Tensor]
) -> tuple[nn.Module, BatchAugmentation]:
    """The loss, and what happens to batches on the device: of probes, normalisation alone."""
    if is_probe(args):
        return ProbeLoss(), BatchAugmentation(norm)
    eraser = None
    if args.reprob:
        eraser = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=norm[0].device)
    if not mixes(args):
        return LabelSmoothingCrossEntropy(args.smoothing), BatchAugmentation(norm, eraser)
    draws = (args.mixup_prob, args.mixup_switch_prob, args.mixup_mode)
    labels = {"label_smoothing": args.smoothing, "num_classes": num_classes(args)}
    mixup = Mixup(args.mixup, args.cutmix, args.cutmix_minmax, *draws, **labels)
    return SoftTargetCrossEntropy(), BatchAugmentation(norm, eraser, mixup)


def resume(
    args: argparse.Namespace, model: nn.Module, stepper: Stepper, sampler: ChunkSampler, ema: ModelEmaV3 | None
) -> tuple[Position, dict[str, float]]:
    """Where to go on, with the best validation so far: from a checkpoint, which is put back, or from the start.

    Raises:
        RunError: a checkpoint of another run.
    """
    found = find_resume(args.output_dir, args.resume, args.auto_resume)
    if not found:
        return Position(args.start_epoch), {"acc1": -1.0, "epoch": -1}
    path, state = found
    position = restore(found, model, stepper, sampler.samples_per_step)
    if "best" not in state:
        raise RunError(f"{path} is not of fine-tuning")
    if ema:
        if "model_ema" not in state:
            raise RunError(f"{path} has no averaged weights: it was trained without --model_ema")
        ema.module.load_state_dict(state["model_ema"])
    return position, state["best"]


def is_validated(args: argparse.Namespace, epoch: Epoch) -> bool:
    """Whether a validation follows an epoch."""
    return epoch.is_last or not (args.disable_eval_during_finetuning or (epoch.index + 1) % args.val_freq)


def waited_enough(args: argparse.Namespace, best: dict[str, float], epoch: int) -> bool:
    """Whether there has been no better validation for --patience of them up to `epoch`."""
    return best["epoch"] >= 0 and 0 < args.patience <= (epoch - best["epoch"]) // args.val_freq


def validate(evaluator: Evaluator, model: nn.Module, epoch: Epoch, best: dict[str, float]) -> None:
    """Validate after an epoch; the weights that did best so far are kept in BEST, their metrics in `best`."""
    metrics = evaluator.validate(model)
    if metrics["acc1"] > best["acc1"]:
        before = dict(best)
        best.update(acc1=metrics["acc1"], epoch=epoch.index)  # goes into the file
        if not utils.broadcast(epoch.save(BEST)):
            best.update(before)
    logger.info(
        "validation: acc1 %.2f  acc5 %.2f  (best %.2f in epoch %d)",
        metrics["acc1"],
        metrics["acc5"],
        best["acc1"],
        best["epoch"],
    )
    epoch.shown |= {f"val_{name}": value for name, value in metrics.items()}


def train(
    args: argparse.Namespace, settings: Settings, device: torch.device, model: nn.Module, evaluator: Evaluator
) -> int:
    """Fine-tune or probe `model`, validating as it goes; returns the exit code."""
    total_batch = args.batch_size * args.num_sample * args.update_freq * utils.world_size()
    with utils.user_errors():
        dataset = build_train_set(args)
        speed = SpeedCheck(dataset.videos, args.input_size) if utils.rank() == 0 else None
        sampler = ChunkSampler(
            len(dataset), args.batch_size, args.update_freq, utils.rank(), utils.world_size(), args.seed
        )
        groups = (
            model.parameter_groups(args.lr, args.weight_decay)
            if isinstance(model, ProbedEncoder)
            else parameter_groups(model, args.weight_decay, args.layer_decay)
        )
        stepper = options.build_stepper(args, model, groups, device, total_batch, sampler.steps_per_epoch)
        ema = ModelEmaV3(model, decay=args.model_ema_decay) if args.model_ema else None
        if args.enable_deepspeed:
            batch_size = args.batch_size * args.num_sample
            stepper = with_deepspeed(stepper, args.zero_stage, batch_size, args.opt, settings.output_dir)

    position, best = resume(args, model, stepper, sampler, ema)
    logger.info(
        "total batch %d clips, %d steps an epoch, %d epochs, lr %.3g, %s on %s",
        total_batch,
        sampler.steps_per_epoch,
        args.epochs,
        args.lr * total_batch / 256,
        stepper.precision,
        device,
    )
    if args.compile:
        model.compile(dynamic=False)
    if not args.enable_deepspeed:
        stepper.model = distribute(model, device)
    pin_memory = args.pin_mem and device.type == "cuda"
    loader = build_loader(dataset, sampler, args.num_workers, pin_memory, args.worker_timeout)
    criterion, augment = build_loss(args, evaluator.norm)
    if speed:
        speed.tell()

    contents = {"model": model, "args": args, "best": best} | ({"model_ema": ema.module} if ema else {})
    with Run(settings, position, loader, stepper, contents) as run:
        if not position.step and waited_enough(args, best, position.epoch - 1):
            run.stop_epoch = position.epoch  # it had stopped early
        for epoch in run.epochs():
            train_one_epoch(stepper.model, criterion, epoch, augment, ema)
            if is_validated(args, epoch) and epoch.secure():
                share_buffers(model)
                validate(evaluator, ema.module if ema else model, epoch, best)
                epoch.is_last |= waited_enough(args, best, epoch.index)
    stepper.close(settings.output_dir)
    return run.exit_code


def load_for_test(args: argparse.Namespace, model: nn.Module, own: bool = False) -> None:
    """The weights to test: --finetune, else, or if `own`, the best of output_dir.

    Raises:
        RunError: neither is there, or it holds no head for these classes.
    """
    best = os.path.join(args.output_dir, BEST)
    path, key, prefix = args.finetune, args.model_key, args.model_prefix
    if own or not path:
        path, key, prefix = (best if args.output_dir and os.path.isfile(best) else ""), "", ""
    if not path:
        raise RunError("nothing to test: give --finetune, or an --output_dir with checkpoint-best.pth")
    if isinstance(model, ProbedEncoder) or args.model_ema:
        load_strictly(model, path, "model_ema" if args.model_ema else "")
    else:
        load_encoder(model, path, need_head=True, key=key, prefix=prefix)


def main(args: argparse.Namespace) -> int:
    """Check, build, and do the chosen job; returns the exit code."""
    device = utils.init_distributed(args.device)
    utils.setup_logging()
    if args.not_needed:
        logger.info("always so here, and so not needed: %s", ", ".join(args.not_needed))
    args.finetune, args.resume = local_path(args.finetune), local_path(args.resume)
    find_problems(args).tell()
    settings = Settings.of(args)
    lock = lock_folder(settings.output_dir) if settings.output_dir and utils.rank() == 0 else None
    utils.seed_everything(args.seed)
    with utils.user_errors():
        evaluator = build_evaluator(args, device)
        model = build_model(args).to(device)
    encoder = model.encoder if isinstance(model, ProbedEncoder) else model
    if args.eval or args.predict:
        load_for_test(args, model)
        return evaluator.predict(model, args.predict) if args.predict else evaluator.test(model)
    if args.finetune:
        load_encoder(encoder, args.finetune, key=args.model_key, prefix=args.model_prefix)
    if args.knn:
        with utils.user_errors():
            neighbours = train_videos(args)
        return evaluator.knn(encoder, args.knn, neighbours)
    code = train(args, settings, device, model, evaluator)
    if code == 0 and not args.dry_run:
        utils.barrier()  # the first process may still be writing the best checkpoint
        if args.output_dir and os.path.isfile(os.path.join(args.output_dir, BEST)):
            load_for_test(args, model, own=True)
        elif args.output_dir:
            logger.warning("no %s in %s: testing the last weights", BEST, args.output_dir)
        code = evaluator.test(model)
    del lock
    return code


if __name__ == "__main__":
    utils.run_main(main, get_args())
