"""The command line of run_class_finetuning.py: options, their validation, and what is derived from them alone.

What depends on the data set is in datasets_finetune.py.
"""

import argparse
import os
import sys
from typing import Any

import options
from checkpoints import best_of
from datasets_finetune import DATA_SETS, find_multi_label, read_class_names
from deepspeed_stepper import ELEMENTWISE
from lists import VIDEO_SUFFIXES, VideoList, any_label, find_files, frames_in, list_of, read_list, why_missing
from metrics import MultiLabelTask, Task
from modeling_finetune import MODELS, token_grid
from modeling_image import find_encoder
from options import Problems
from shards import problem_of
from video_transforms_finetune import TrainAugmentation
from weights import check_kind, local_path

LIST_SUFFIXES = (".csv", ".txt", ".list", ".lst", ".tsv")  # other files that --predict names are videos
TEXT = """Fine-tune or probe a SMILE encoder for classification, and test it.

scripts/finetune/ and scripts/test/ hold the recipes. Without further flags it fine-tunes, then tests the best
checkpoint on all views; --eval, --predict and --knn do no training.
"""

# Options that say what the weights of a checkpoint belong to, beside the model's name.
HOW_TRAINED = ["model_ema", "linear_probe", "attentive_probe", "probe_lrs", "probe_wds", "encoder", "encoder_weights"]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option groups `model` and `augmentation`."""
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, metavar="NAME", default="vit_base_patch16_224", help=", ".join(MODELS))
    add("--finetune", default="", help="checkpoint to start from, or to test with --eval")
    add("--model_key", default="", help="key of the weights in --finetune, such as `model|module`; '': the usual")
    add("--model_prefix", default="", help="prefix of the weights' names in --finetune, besides the usual encoder.")
    add("--drop", type=float, default=0.0, help="dropout in the blocks")
    add("--attn_drop_rate", type=float, default=0.0, help="dropout of attention")
    add("--drop_path", type=float, default=0.1, help="stochastic depth rate of the last block")
    add("--fc_drop_rate", type=float, default=0.0, help="dropout before the head")
    add("--init_scale", type=float, default=0.001, help="factor on the head's initial weights")
    add("--use_checkpoint", action="store_true", help="recompute activations to save memory")
    add("--model_ema", action="store_true", help="average the weights, and validate the average")
    add("--model_ema_decay", type=float, default=0.9999, help="decay of the average")

    add = parser.add_argument_group("augmentation").add_argument
    add("--aa", default="rand-m7-n4-mstd0.5-inc1", help="timm RandAugment policy; '' for none")
    filters, operations = ("bilinear", "bicubic", "random"), "interpolation of RandAugment's geometric operations"
    add("--train_interpolation", choices=filters, default="bicubic", help=operations)
    add("--crop_area", type=float, default=0.25, help="smallest fraction of the frame in a random crop")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    weights = "of the loss; balanced: inverse class frequency, with mean 1 over the videos"
    add("--class_weights", choices=("none", "balanced"), default="none", help=weights)
    add("--mixup", type=float, default=0.8, help="alpha; 0: off")
    add("--cutmix", type=float, default=1.0, help="alpha; 0: off")
    add("--cutmix_minmax", type=float, nargs=2, help="fraction of the side pasted, in place of alpha")
    add("--mixup_prob", type=float, default=1.0, help="probability of Mixup or CutMix")
    add("--mixup_switch_prob", type=float, default=0.5, help="probability of CutMix, if both are on")
    add("--mixup_mode", choices=("batch", "pair", "elem"), default="batch", help="granularity of the draw")
    add("--reprob", type=float, default=0.25, help="probability of random erasing")
    add("--remode", choices=("const", "rand", "pixel"), default="pixel", help="how erased pixels are filled")
    add("--recount", type=int, default=1, help="rectangles of random erasing")


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option groups of frozen evaluation, and of validation and test."""
    add = parser.add_argument_group("frozen evaluation").add_argument
    add("--linear_probe", action="store_true", help="train linear classifiers on the frozen encoder")
    learn = "head: only fc_norm and the classifier, on a frozen encoder (SIGMA's linear probe)"
    add("--learn", choices=("all", "head"), default="all", help=learn)
    add("--attentive_probe", action="store_true", help="train attentive classifiers on the frozen encoder")
    add("--probe_lrs", type=float, nargs="+", default=[1e-2, 3e-3, 1e-3], help="learning rates tried together")
    add("--probe_wds", type=float, nargs="+", default=[0.0, 0.05], help="weight decays tried together")
    image = "probe an image model of open_clip or timm instead, on the mean of its frames' features"
    add("--encoder", "--encoder_model", default="", metavar="NAME", help=image)
    weights = "of --encoder: an open_clip tag, `timm`, hf-hub:OWNER/NAME, local file, or `random`; '': openai or timm"
    add("--encoder_weights", default="", help=weights)
    add("--knn", type=int, default=0, metavar="K", help="classify by the K nearest training videos, without training")

    add = parser.add_argument_group("validation and test").add_argument
    add("--eval", action="store_true", help="only test --finetune, or the best of output_dir")
    inputs = "predict the classes of videos without labels: files, folders, lists; writes predictions.csv and .npz"
    add("--predict", nargs="+", default=[], metavar="VIDEO", help=inputs)
    add("--val_freq", type=int, default=1, help="epochs between validations")
    add("--disable_eval_during_finetuning", action="store_true", help="validate after the last epoch")
    add("--patience", type=int, default=0, help="stop after this many validations without improvement; 0: never")
    add("--short_side_size", type=int, default=0, help="resize test videos to it; 0: the input size")
    add("--test_num_segment", type=int, default=0, help="views in time; 0: the data set's")
    add("--test_num_crop", type=int, default=0, help="views in space; 0: the data set's")
    add("--combine_views", choices=("mean", "max"), help="how to combine the scores of views; None: by data set")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (`argv`, or sys.argv)."""
    parser = options.make_parser("SMILE fine-tuning", TEXT)

    add = options.add_data_arguments(parser)
    add("--data_set", choices=DATA_SETS, default="Kinetics-400", help="gives classes, flip, sampling and test views")
    add("--data_path", default="", help="folder with train.csv, val.csv, test.csv (and classes.txt)")
    add("--nb_classes", type=int, default=0, help="number of classes; 0: that of the data set")
    add("--num_sample", type=int, default=1, help="augmentations per decoded clip")
    add("--samples_per_class", type=int, default=0, help="number of training videos per class; 0: all")
    add("--num_train_videos", type=int, default=0, help="number of training videos; 0: all")
    add("--examples", type=int, default=0, help="train on SEVERE's subset of about this size; 0: all")

    add_model_arguments(parser)
    add = options.add_optimizer_arguments(parser)
    add("--batch_size", type=int, default=4, help="videos per GPU and forward pass")
    add("--layer_decay", type=float, default=0.75, help="factor on the learning rate per layer, from the top")
    parser.set_defaults(epochs=100, opt_betas=[0.9, 0.999], lr=1e-3, min_lr=1e-6, warmup_epochs=5)
    add_evaluation_arguments(parser)
    options.add_run_arguments(parser)
    add = parser.add_argument_group("DeepSpeed").add_argument
    add("--enable_deepspeed", action="store_true", help="fine-tune with DeepSpeed in place of DDP")
    stages = "what is sharded: 1 optimizer state, 2 also gradients; 0 (nothing) becomes 1"
    add("--zero_stage", type=int, choices=(0, 1, 2), default=0, help=stages)
    is_file = lambda word: word.lower().endswith(VIDEO_SUFFIXES) or os.path.isfile(word)
    argv = sys.argv[1:] if argv is None else argv
    argv = [f"./{word}" if word.startswith("-") and is_file(word) else word for word in argv]  # not an option
    args = options.parse(parser, argv)
    data_set = DATA_SETS[args.data_set]
    lists = [data_set.list_path(args.data_path, name) for name in (data_set.train_list, "val.csv", "test.csv")]
    args.several_labels = find_multi_label(lists) if args.data_path and not data_set.num_classes else ""
    return args


def num_classes(args: argparse.Namespace) -> int:
    """Return the number of classes, from the flag or the data set; 0 if unknown."""
    return args.nb_classes or DATA_SETS[args.data_set].num_classes or 0


def class_names(args: argparse.Namespace) -> list[str] | None:
    """Read the lines of classes.txt, if there is one."""
    return read_class_names(args.data_path, num_classes(args)) if args.data_path else None


def is_probe(args: argparse.Namespace) -> bool:
    """Return whether probes are trained side by side on a frozen encoder."""
    return args.linear_probe or args.attentive_probe


def multi_label(args: argparse.Namespace) -> bool:
    """Return whether videos have several labels: by the data set, or by the labels in the lists of a custom one."""
    return DATA_SETS[args.data_set].multi_label or bool(args.several_labels)


def mixes(args: argparse.Namespace) -> bool:
    """Return whether Mixup or CutMix is applied: not for probes, nor to videos with several labels."""
    unmixed = is_probe(args) or args.knn or multi_label(args)
    return bool(args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax) and not unmixed


def task(args: argparse.Namespace) -> Task:
    """Return the task that the labels of the data set define."""
    data_set, classes = DATA_SETS[args.data_set], num_classes(args)
    combine = args.combine_views or data_set.combine
    if multi_label(args):
        return MultiLabelTask(combine, classes, needs_seconds=data_set.multi_label)
    return Task(combine, classes)


def follow_checkpoint(args: argparse.Namespace) -> None:
    """For --eval, --predict and --knn, take options from the checkpoint, unless given; see options.follow.

    For training, log how the clips differ from the checkpoint's.
    """
    evaluates = args.eval or args.predict
    path = args.finetune or (best_of(args.output_dir) if evaluates else "")
    if not os.path.exists(path):  # reported by find_problems
        return
    stored = options.trained_with(path)
    if stored.get("linear_probe_recipe") == "sigma":  # what --learn head was called
        stored["linear_probe"] = False
    data_set = DATA_SETS.get(stored.get("data_set", ""))
    if not (evaluates or args.knn > 0):
        by_stride = "segments" not in {DATA_SETS[args.data_set].sampling, data_set and data_set.sampling}
        clip = [name for name in options.CLIP_OPTIONS if by_stride or name != "sampling_rate"]
        options.warn_differences(args, stored, path, clip)
        return
    names = ["model", *options.CLIP_OPTIONS, *(HOW_TRAINED if evaluates else ())]
    if data_set:
        names.append("data_set")
        if not DATA_SETS[args.data_set if "data_set" in args.given else stored["data_set"]].num_classes:
            stored["nb_classes"] = stored["nb_classes"] or data_set.num_classes
            names.append("nb_classes")
    options.follow(args, stored, path, names)
    args.several_labels = args.several_labels or stored.get("several_labels", "")


def read_data_list(args: argparse.Namespace, name: str) -> VideoList:
    """Read the list `name` of the data set, and check its labels."""
    parse = task(args).parse_test_label if name == "test.csv" else task(args).parse_label
    return read_list(DATA_SETS[args.data_set].list_path(args.data_path, name), parse, args.data_root)


def predict_videos(args: argparse.Namespace) -> VideoList:
    """Find the videos that --predict names: files, folders and lists of them. Raises ValueError if some are missing."""
    paths: list[str] = []
    for name in args.predict:
        if os.path.isdir(name):
            found = find_files(name, VIDEO_SUFFIXES)
            if not found:
                why = frames_in(name) or f"no videos in it ({' '.join(VIDEO_SUFFIXES)})"
                raise ValueError(f"--predict {name}: {why}")
            paths += found
        elif problem_of(name):
            raise ValueError(f"--predict {name}: {why_missing(name)}")
        elif name.lower().endswith(LIST_SUFFIXES):
            videos = read_list(name, any_label, args.data_root, labelled=False)
            videos.check_files(args.max_bad_fraction)
            paths += [videos.path(index) for index in range(len(videos))]
        else:
            paths.append(name)
    return list_of("--predict", paths)


def check_list(args: argparse.Namespace, name: str) -> None:
    """Read a list and look for some of its videos, with --examples for all training videos. Raises ValueError."""
    videos = read_data_list(args, name)
    if args.examples and name == DATA_SETS[args.data_set].train_list:
        missing = videos.missing(range(len(videos)))
        if missing:
            raise ValueError(
                f"{videos.where(missing[0])}: no such file: {videos.path(missing[0])} ({len(missing)} of {len(videos)} "
                "are missing); what --examples draws depends on the whole list"
            )
    videos.check_files(args.max_bad_fraction)
    unlabelled = name == "test.csv" and task(args).unlabelled(videos)
    if multi_label(args) and not unlabelled and (videos.labels == b"-").all():
        raise ValueError(f"{videos.source}: none of its {len(videos)} videos shows any class")


def find_problems(args: argparse.Namespace) -> Problems:
    """Collect everything wrong with the arguments that can be seen without building a model."""
    problems, known = Problems(args), DATA_SETS[args.data_set].num_classes
    problems.files("finetune", "resume")
    problems.numbers(0, "knn", "test_num_segment", "test_num_crop", "samples_per_class", "num_train_videos", "examples")
    problems.numbers(1, "batch_size", "num_sample", "val_freq")
    if args.encoder:
        problems.attempt(find_encoder, args.encoder, local_path(args.encoder_weights), prefix="--encoder_")
    elif os.path.exists(args.finetune):
        problems.attempt(check_kind, args.finetune, "blocks.0.attn.qkv.weight", "SMILE or VideoMAE", args.model_key)
    problems.attempt(token_grid, args.num_frames, args.input_size, args.input_size, prefix="--")
    augmentation = (args.input_size, args.aa, False, args.train_interpolation, args.crop_area)
    problems.attempt(TrainAugmentation, *augmentation, prefix="--")
    wrong_number = bool(known and args.nb_classes not in (0, known))
    if num_classes(args) and not wrong_number:
        problems.attempt(class_names, args)
        train = [] if args.eval else [DATA_SETS[args.data_set].train_list]
        val = [] if args.eval or args.knn else ["val.csv"]
        if args.predict:
            problems.attempt(predict_videos, args)
            if not args.output_dir and not os.access(".", os.W_OK):
                problems.add({"--predict writes to the current folder, which is read-only: give --output_dir": True})
        for name in () if args.predict else (*train, *val, "test.csv"):
            problems.attempt(check_list, args, name)
    name, side, odd = args.data_set, args.short_side_size, args.batch_size * args.num_sample % 2 == 1
    other = f"--nb_classes {args.nb_classes}: {name} has {known} classes; other lists are --data_set custom"
    several, draws = f"but videos of {name} have several labels", args.samples_per_class or args.examples
    weighted, uneven = args.class_weights != "none", odd and mixes(args)
    problems.add(
        {
            f"--short_side_size {side}: smaller than --input_size": 0 < side < args.input_size,
            f"--data_set {name} needs --nb_classes": not num_classes(args),
            other: wrong_number,
            f"--samples_per_class and --examples draw class by class, {several}": multi_label(args) and draws,
            f"--class_weights {args.class_weights}: for one class per video, {several}": multi_label(args) and weighted,
            f"--batch_size {args.batch_size}: Mixup and CutMix need an even number of clips per batch": uneven,
        }
    )
    problems.add(contradictions(args))
    return problems


def contradictions(args: argparse.Namespace) -> dict[str, Any]:
    """Map messages about options that exclude or need each other to whether they apply."""
    probe, head, knn, evaluates = is_probe(args), args.learn == "head", args.knn, args.eval or args.predict
    few, weights = args.samples_per_class or args.num_train_videos, args.finetune or args.encoder or args.eval
    used, tests = probe or knn, evaluates or knn
    return {
        "--examples draws by a rule of its own: omit --samples_per_class and --num_train_videos": args.examples and few,
        "--resume continues training: give the weights to test to --finetune": args.resume and tests,
        "--linear_probe normalises over the batch: it needs 2 clips or more (--batch_size)": args.linear_probe
        and not tests
        and args.batch_size * args.num_sample < 2,
        "--dry_run tries a training step: omit it with --eval, --predict and --knn": args.dry_run and tests,
        "--linear_probe and --attentive_probe: choose one": args.linear_probe and args.attentive_probe,
        "--knn is a test of its own: give it without --eval, --predict and probes": knn and (evaluates or probe),
        "a frozen encoder needs weights: give --finetune, or --encoder": (head or used) and not weights,
        "--learn head fine-tunes the classifier: omit --linear_probe, --attentive_probe and --knn": head and used,
        f"--opt {args.opt}: ZeRO shards flattened weights, so only element-wise optimizers work "
        f"({', '.join(ELEMENTWISE)}); omit --enable_deepspeed": args.enable_deepspeed and args.opt not in ELEMENTWISE,
        f"--encoder {args.encoder}: add --linear_probe, --attentive_probe or --knn": args.encoder and not used,
        "--finetune starts from a video model, and --encoder is an image model with --encoder_weights: omit "
        "one": args.encoder and args.finetune and not evaluates,
        "--clip_grad would couple the probes that are trained side by side: omit it": probe and args.clip_grad,
        "probes take lr and weight decay from --probe_lrs and --probe_wds; omit --lr and --weight_decay": probe
        and min(args.weight_decay, args.lr) <= 0,
    }
