"""The command line of fine-tuning: its options, what is wrong with them, and what follows from them alone.

run_class_finetuning.py builds what they describe. What depends on the data set is no option; it stands in
datasets_finetune.py.
"""

import argparse
import os
import sys

import options
from checkpoints import BEST
from datasets_finetune import DATA_SETS, find_several, read_class_names
from deepspeed_stepper import ELEMENTWISE
from lists import VIDEO_SUFFIXES, VideoList, any_label, find_files, frames_in, list_of, read_list, why_missing
from metrics import SeveralLabels, Task
from modeling_finetune import MODELS, token_grid
from modeling_image import find_encoder
from options import Problems
from shards import problem_of
from video_transforms_finetune import TrainAugmentation
from weights import check_kind

LIST_SUFFIXES = (".csv", ".txt", ".list", ".lst", ".tsv")  # other files that --predict names are videos
TEXT = """Fine-tune or probe a SMILE encoder for classification, and test it.

scripts/finetune/ and scripts/test/ hold the recipes. Without further flags it fine-tunes, then tests the best
checkpoint on all views; --eval, --predict and --knn do no training.
"""

# Options that say what the weights of a checkpoint belong to, beside the model's name.
HOW_TRAINED = ("model_ema", "linear_probe", "attentive_probe", "probe_lrs", "probe_wds", "encoder",
              "encoder", "encoder_weights")  # fmt: skip


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (`argv`, or sys.argv)."""
    parser = options.make_parser("SMILE fine-tuning", TEXT)

    data = options.add_data_arguments(parser)
    decides = "decides classes, flip, sampling and test views; `custom` needs --nb_classes"
    data.add_argument("--data_set", choices=DATA_SETS, default="Kinetics-400", help=decides)
    data.add_argument("--data_path", default="", help="folder with train.csv, val.csv, test.csv (and classes.txt)")
    data.add_argument("--nb_classes", type=int, default=0, help="classes; 0: the data set's")
    data.add_argument("--num_sample", type=int, default=1, help="augmentations of each decoded clip")
    data.add_argument("--samples_per_class", type=int, default=0, help="train on so many videos a class; 0: all")
    data.add_argument("--num_train_videos", type=int, default=0, help="train on so many videos; 0: all")
    subset = "train on the subset of about so many videos that the SEVERE benchmark draws (1000); 0: all"
    data.add_argument("--examples", type=int, default=0, help=subset)

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
    augment.add_argument(
        "--train_interpolation",
        choices=filters,
        default="bicubic",
        help="interpolation of RandAugment's geometric operations",
    )
    area = "smallest share of the frame's area that a random crop keeps"
    augment.add_argument("--crop_area", type=float, default=0.25, help=area)
    augment.add_argument("--smoothing", type=float, default=0.1, help="label smoothing")
    weights = "of the loss; balanced: by the inverse of how many videos a class has, 1 on average over the videos"
    augment.add_argument("--class_weights", choices=("none", "balanced"), default="none", help=weights)
    augment.add_argument("--mixup", type=float, default=0.8, help="alpha; 0: off")
    augment.add_argument("--cutmix", type=float, default=1.0, help="alpha; 0: off")
    augment.add_argument("--cutmix_minmax", type=float, nargs=2, help="share of the side pasted, in place of alpha")
    augment.add_argument("--mixup_prob", type=float, default=1.0, help="of either")
    augment.add_argument("--mixup_switch_prob", type=float, default=0.5, help="of CutMix, where both are on")
    augment.add_argument(
        "--mixup_mode", choices=("batch", "pair", "elem"), default="batch", help="granularity of the draw"
    )
    augment.add_argument("--reprob", type=float, default=0.25, help="random erasing, probability")
    augment.add_argument("--remode", choices=("const", "rand", "pixel"), default="pixel", help="filling of the erased")
    augment.add_argument("--recount", type=int, default=1, help="random erasing, rectangles")

    optim = options.add_optimizer_arguments(parser)
    optim.add_argument("--batch_size", type=int, default=4, help="videos a GPU and forward pass")
    optim.add_argument("--layer_decay", type=float, default=0.75, help="factor on the rate, a layer down")
    parser.set_defaults(epochs=100, opt_betas=[0.9, 0.999], lr=1e-3, min_lr=1e-6, warmup_epochs=5)

    frozen = parser.add_argument_group("frozen evaluation")
    frozen.add_argument("--linear_probe", action="store_true", help="train linear classifiers on the frozen encoder")
    learn = "head: only fc_norm and the classifier, on a frozen encoder (SIGMA's linear probe)"
    frozen.add_argument("--learn", choices=("all", "head"), default="all", help=learn)
    frozen.add_argument("--attentive_probe", action="store_true", help="the same, pooling with learned attention")
    frozen.add_argument("--probe_lrs", type=float, nargs="+", default=[1e-2, 3e-3, 1e-3], help="rates tried together")
    frozen.add_argument("--probe_wds", type=float, nargs="+", default=[0.0, 0.05], help="weight decays tried together")
    image = "probe an image model of open_clip or timm instead, on the mean of its frames' features"
    frozen.add_argument("--encoder", "--encoder_model", default="", metavar="NAME", help=image)
    weights = "of --encoder: an open_clip tag, `timm`, hf-hub:OWNER/NAME, local file, or `random`; '': openai or timm"
    frozen.add_argument("--encoder_weights", default="", help=weights)
    frozen.add_argument("--knn", type=int, default=0, metavar="K", help="test K nearest neighbours, without training")

    test = parser.add_argument_group("validation and test")
    test.add_argument("--eval", action="store_true", help="only test --finetune (or output_dir's best)")
    inputs = "predict the classes of videos without labels: files, folders, lists; writes predictions.csv and .npz"
    test.add_argument("--predict", nargs="+", default=[], metavar="VIDEO", help=inputs)
    test.add_argument("--val_freq", type=int, default=1, help="epochs between validations")
    test.add_argument("--disable_eval_during_finetuning", action="store_true", help="validate after the last epoch")
    test.add_argument("--patience", type=int, default=0, help="stop after so many validations without a best; 0: never")
    test.add_argument("--short_side_size", type=int, default=0, help="resize test videos to it; 0: the input size")
    test.add_argument("--test_num_segment", type=int, default=0, help="views in time; 0: the data set's")
    test.add_argument("--test_num_crop", type=int, default=0, help="views in space; 0: the data set's")
    test.add_argument("--combine_views", choices=("mean", "max"), help="of the views' scores; None: the data set's")

    options.add_run_arguments(parser)
    deepspeed = parser.add_argument_group("DeepSpeed")
    deepspeed.add_argument("--enable_deepspeed", action="store_true", help="fine-tune with DeepSpeed in place of DDP")
    stages = "what processes share out: 1 optimizer state, 2 gradients too; 0 (nothing) becomes 1"
    deepspeed.add_argument("--zero_stage", type=int, choices=(0, 1, 2), default=0, help=stages)
    argv = sys.argv[1:] if argv is None else argv
    is_file = lambda word: word.lower().endswith(VIDEO_SUFFIXES) or os.path.isfile(word)
    argv = [f"./{word}" if word.startswith("-") and is_file(word) else word for word in argv]  # it is no option
    args = options.parse(parser, argv)
    data_set = DATA_SETS[args.data_set]
    lists = [data_set.list_path(args.data_path, name) for name in (data_set.train_list, "val.csv", "test.csv")]
    args.several_labels = find_several(lists) if args.data_path and not data_set.num_classes else ""
    return args


def read_data_list(args: argparse.Namespace, name: str) -> VideoList:
    """The list `name` of the data set, labels checked."""
    parse = task(args).parse_test_label if name == "test.csv" else task(args).parse_label
    return read_list(DATA_SETS[args.data_set].list_path(args.data_path, name), parse, args.data_root)


def predict_videos(args: argparse.Namespace) -> VideoList:
    """The videos that --predict names: files, those in folders and below, those of lists.

    Raises:
        ValueError: one is not there, or a folder or list without videos.
    """
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
            videos = read_list(name, any_label, args.data_root)
            videos.check_files(args.max_bad_fraction)
            paths += [videos.path(index) for index in range(len(videos))]
        else:
            paths.append(name)
    return list_of("--predict", paths)


def num_classes(args: argparse.Namespace) -> int:
    """Number of classes, from the flag or the data set; 0 if neither says."""
    return args.nb_classes or DATA_SETS[args.data_set].num_classes or 0


def class_names(args: argparse.Namespace) -> list[str] | None:
    """The lines of classes.txt, if there is one."""
    return read_class_names(args.data_path, num_classes(args)) if args.data_path else None


def is_probe(args: argparse.Namespace) -> bool:
    """Whether probes are trained side by side on a frozen encoder."""
    return args.linear_probe or args.attentive_probe


def multi_label(args: argparse.Namespace) -> bool:
    """Whether a video shows several classes: by the data set, or the form of a custom one's lists."""
    return DATA_SETS[args.data_set].multi_label or bool(args.several_labels)


def task(args: argparse.Namespace) -> Task:
    """What the labels of the data set mean."""
    data_set = DATA_SETS[args.data_set]
    combine, classes = args.combine_views or data_set.combine, num_classes(args)
    if multi_label(args):
        return SeveralLabels(combine, classes, needs_seconds=data_set.multi_label)
    return Task(combine, classes)


def check_list(args: argparse.Namespace, name: str) -> None:
    """Read a list and look for its videos: with --examples for every one to train on, else for some.

    Raises:
        ValueError: something is wrong with it.
    """
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
    """Everything wrong with the arguments that can be seen without building a model."""
    problems, probe = Problems(args), is_probe(args)
    problems.files("finetune", "resume")
    problems.numbers(0, "knn", "test_num_segment", "test_num_crop", "samples_per_class", "num_train_videos", "examples")
    side = args.short_side_size
    problems.add({f"--short_side_size {side}: smaller than --input_size": 0 < side < args.input_size})
    problems.numbers(1, "batch_size", "num_sample", "val_freq")
    if args.encoder:
        problems.attempt(find_encoder, args.encoder, args.encoder_weights, prefix="--encoder_")
    elif os.path.exists(args.finetune):
        problems.attempt(check_kind, args.finetune, "blocks.0.attn.qkv.weight", "SMILE or VideoMAE", args.model_key)
    problems.attempt(token_grid, args.num_frames, args.input_size, args.input_size, prefix="--")
    augmentation = (args.input_size, args.aa, False, args.train_interpolation, args.crop_area)
    problems.attempt(TrainAugmentation, *augmentation, prefix="--")
    name, data_set = args.data_set, DATA_SETS[args.data_set]
    known, head = data_set.num_classes, args.learn == "head"
    other = known and args.nb_classes not in (0, known)
    if num_classes(args) and not other:
        problems.attempt(class_names, args)
        problems.attempt(predict_videos, args) if args.predict else None
        for needed in needed_lists(args):
            problems.attempt(check_list, args, needed)
    few, draws = args.samples_per_class or args.num_train_videos, args.samples_per_class or args.examples
    evaluates, odd = bool(args.eval or args.predict), args.batch_size * args.num_sample % 2 == 1
    frozen, weights = probe or head or args.knn, args.finetune or args.encoder or args.eval
    several = f"but {name} has several labels a video"
    problems.add(
        {
            f"--data_set {name} needs --nb_classes": not num_classes(args),
            f"--nb_classes {args.nb_classes}: {name} has {known} classes; other lists are --data_set custom": other,
            "--examples draws by a rule of its own: leave --samples_per_class and --num_train_videos": args.examples
            and few,
            f"--samples_per_class and --examples draw class by class, {several}": multi_label(args) and draws,
            f"--class_weights {args.class_weights}: for one class a video, {several}": multi_label(args)
            and args.class_weights != "none",
            f"--batch_size {args.batch_size}: Mixup and CutMix need an even number of clips a batch": odd
            and mixes(args),
            "--dry_run tries a training step: leave it with --eval, --predict and --knn": args.dry_run
            and (evaluates or args.knn),
            "--linear_probe and --attentive_probe: choose one": args.linear_probe and args.attentive_probe,
            "--knn is a test of its own: give it without --eval, --predict and probes": args.knn
            and (evaluates or probe),
            "a frozen encoder needs weights: give --finetune, or --encoder": frozen and not weights,
            "--learn head fine-tunes the classifier: leave --linear_probe, --attentive_probe and --knn": head
            and (probe or args.knn),
            f"--opt {args.opt}: DeepSpeed cuts weights into flat pieces, which is known to be right for "
            f"{', '.join(ELEMENTWISE)} only; leave --enable_deepspeed": args.enable_deepspeed
            and args.opt not in ELEMENTWISE,
            f"--encoder {args.encoder}: add --linear_probe, --attentive_probe or --knn": args.encoder
            and not (probe or args.knn),
            "--finetune starts from a video model, and --encoder is an image model with --encoder_weights: leave one": (
                args.encoder and args.finetune and not evaluates
            ),
            "--clip_grad would couple the probes that are trained side by side: leave it": probe and args.clip_grad,
            "probes take lr and weight decay from --probe_lrs and --probe_wds; leave --lr and --weight_decay": probe
            and min(args.weight_decay, args.lr) <= 0,
        }
    )
    return problems


def checkpoint_to_test(args: argparse.Namespace) -> str:
    """What --eval and --predict test: --finetune, else the best of output_dir, else none."""
    best = os.path.join(args.output_dir, BEST)
    return args.finetune or (best if args.output_dir and os.path.isfile(best) else "")


def follow_checkpoint(args: argparse.Namespace) -> None:
    """For --eval, --predict and --knn, take options from the checkpoint, unless given; see options.follow.

    For training, log how the clips differ from the checkpoint's.

    Raises:
        RunError: the checkpoint is unreadable.
    """
    evaluates = args.eval or args.predict
    path = checkpoint_to_test(args) if evaluates else args.finetune
    if not os.path.exists(path):  # find_problems tells
        return
    stored = options.trained_with(path)
    if stored.get("linear_probe_recipe") == "sigma":  # what --learn head was called
        stored["linear_probe"] = False
    data_set = DATA_SETS.get(stored.get("data_set", ""))
    if not (evaluates or args.knn > 0):
        by_stride = DATA_SETS[args.data_set].sampling == "dense" and (not data_set or data_set.sampling == "dense")
        clip = [name for name in options.CLIP if by_stride or name != "sampling_rate"]
        options.tell_differences(args, stored, path, clip)
        return
    names = ["model", *options.CLIP, *(HOW_TRAINED if evaluates else ())]
    if data_set:
        names.append("data_set")
        if not DATA_SETS[args.data_set if "data_set" in args.given else stored["data_set"]].num_classes:
            stored["nb_classes"] = stored["nb_classes"] or data_set.num_classes
            names.append("nb_classes")
    options.follow(args, stored, path, names)
    args.several_labels = args.several_labels or stored.get("several_labels", "")


def needed_lists(args: argparse.Namespace) -> list[str]:
    """Which lists the chosen job reads."""
    train = DATA_SETS[args.data_set].train_list
    if args.predict:
        return []
    if args.eval:
        return ["test.csv"]
    return [train, "test.csv"] if args.knn else [train, "val.csv", "test.csv"]


def mixes(args: argparse.Namespace) -> bool:
    """Whether batches are mixed: not for probes, nor where a video has several labels."""
    unmixed = is_probe(args) or args.knn or multi_label(args)
    return bool(args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax) and not unmixed
