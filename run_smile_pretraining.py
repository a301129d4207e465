"""Pretrain SMILE: the command line, the model and data built from it, and the loop over epochs.

Stage 1 pastes moving objects (``--add_tubelets --mask_type tubelet``); stage 2 starts from its weights
(``--first_stage_path``) on natural clips with a tube mask. In these two flags, named by the released code, a tubelet is
a pasted object with its path; everywhere else it is VideoMAE's cube of 2 x 16 x 16 pixels that becomes a token.
scripts/pretrain/ holds the recipes.
"""

import argparse
import os

import torch

import modeling_teacher
import options
import utils
from datasets import ChunkSampler, PretrainDataset, find_images
from engine_for_pretraining import train_one_epoch
from lists import VideoList, any_label, list_of, read_list
from masking_generator import MASK_TYPES, SUB_MASK_TYPES, MaskGenerator
from modeling_finetune import channel_stats, token_grid
from modeling_pretrain import MODELS
from modeling_teacher import DINO_MODELS, TARGET_TYPES, TEACHER_NORMS, PixelTarget, check_timm_weights
from object_overlay import MOTION_TYPES, SCALES, ObjectLibrary, ObjectOverlay, find_objects
from optim_factory import DTYPES, parameter_groups, pick_precision
from options import Problems
from utils import logger
from video_transforms import BACKGROUNDS, ClipSource
from weights import check_kind, local_path

GENERATED = ("black", "noise")  # backgrounds that need no files
TEACHER_WEIGHTS = ("clip_weights", "dino_weights", "teacher_weights")  # options that may name a file


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (`argv`, or sys.argv)."""
    parser = options.make_parser("SMILE pretraining", __doc__)

    add = options.add_data_arguments(parser)
    add("--data_path", default="", help="list, one `path label` per line; of --background image a folder")
    add("--background", choices=BACKGROUNDS, default="video", help="source of the base clip")
    add("--epoch_size", type=int, default=0, help="clips per epoch, of --background black and noise")
    add("--pan", type=float, default=0.0, help="how far an image or frame moves, as a fraction of its short side")
    add("--num_sample", type=int, default=1, help="clips (crop, overlay, mask) per decoded window")

    add = parser.add_argument_group("overlay (stage 1)").add_argument
    add("--add_tubelets", action="store_true", help="paste moving objects on the clips")
    add("--use_objects", action="store_true", help="object images; without it patches of the clip")
    add("--objects_path", default="", help="folder with <category>/<name>.png")
    add("--objects_list", default="", help="list of the objects to use, one relative path per line")
    add("--motion_type", choices=MOTION_TYPES, default="gaussian", help="how objects move")
    add("--scales", type=int, nargs="+", default=list(SCALES), help="box sides, pixels of 224")
    add("--num_rois", type=int, default=2, help="objects per clip")
    add("--speed", type=float, default=1.0, help="factor on motion, rotation and growth of objects")

    add = parser.add_argument_group("mask").add_argument
    add("--mask_type", choices=MASK_TYPES, default="tube", help="tubelet follows the pasted objects")
    add("--sub_mask_type", choices=SUB_MASK_TYPES, default="tube+traj_mask", help="variant of tubelet")
    add("--mask_ratio", type=float, default=0.8, help="fraction of the tokens hidden from the encoder")
    add("--traj_unmask_ratio", type=float, default=0.1, help="fraction of the object tokens left visible")
    add("--multiple_sampling", action="store_true", help="train each clip with two masks")

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, metavar="NAME", default="pretrain_videomae_base_patch16_224", help=", ".join(MODELS))
    add("--decoder_depth", type=int, default=4, help="decoder blocks")
    add("--drop_path", type=float, default=0.0, help="stochastic depth rate of the last block")
    add("--use_checkpoint", action="store_true", help="recompute activations to save memory")
    add("--first_stage_path", default="", help="stage 1 checkpoint whose weights to start from")

    add = parser.add_argument_group("teacher").add_argument
    add("--target_type", choices=TARGET_TYPES, default="clip", help="what is reconstructed")
    add("--distillation_teacher", choices=("clip_b", *DINO_MODELS), default="clip_b", help="dino_*: for dino_v1")
    add("--clip_model", default="ViT-B-16", help="open_clip model")
    add("--clip_weights", default="openai", help="open_clip tag, local file, or `random` for tests")
    add("--dino_weights", default="timm", help="`timm` to fetch them, local file, or `random`")
    dinov2 = "vit_small_patch14_reg4_dinov2.lvd142m"
    add("--teacher_model", default=dinov2, help="model of --target_type timm")
    weights = "`timm` to fetch the model's own, hf-hub:OWNER/NAME, local file, or `random`"
    add("--teacher_weights", default="timm", help=weights)
    add("--teacher_stage", type=int, default=-1, help="which of its intermediate features; -1: last")
    add("--teacher_norm", choices=TEACHER_NORMS, default="imagenet", help="normalisation of its frames")
    add("--teacher_size", type=int, default=0, help="side of its frames, pixels; 0: the model's own")

    add = options.add_optimizer_arguments(parser)
    add("--batch_size", type=int, default=32, help="clips per GPU and forward pass, counting every mask")
    parser.set_defaults(epochs=801, opt_betas=[0.9, 0.95], lr=1.5e-4, min_lr=1e-5, warmup_epochs=40)
    options.add_run_arguments(parser)
    return options.parse(parser, argv)


def clips_per_video(args: argparse.Namespace) -> int:
    """Number of training clips made from each video in an epoch: views times masks."""
    return args.num_sample * (2 if args.multiple_sampling else 1)


def find_problems(args: argparse.Namespace) -> Problems:
    """Find everything wrong with the arguments that can be seen without building a model."""
    problems, ratio, unmask, kind = Problems(args), args.mask_ratio, args.traj_unmask_ratio, args.background
    problems.files("first_stage_path", "resume")
    problems.numbers(0, "decoder_depth", "speed")
    problems.numbers(1, "num_rois")
    grid = problems.attempt(token_grid, args.num_frames, args.input_size, args.input_size, prefix="--")
    if grid and 0 < ratio < 1:
        problems.attempt(MaskGenerator, args.mask_type, grid, ratio, prefix="--")
    videos, views = problems.attempt(read_videos, args), clips_per_video(args)
    if videos and kind not in GENERATED:
        problems.attempt(videos.check_files, args.max_bad_fraction)
    if args.add_tubelets and args.use_objects:
        problems.attempt(find_objects, args.objects_path, args.objects_list, prefix="--")
    uneven = min(args.num_sample, args.batch_size) < 1 or args.batch_size % max(1, views) > 0
    dino = args.target_type == "dino_v1" and args.distillation_teacher not in DINO_MODELS
    default = "target_type" not in args.given
    unused_dino = default and args.distillation_teacher in DINO_MODELS
    unused_timm = default and {"teacher_model", "teacher_weights", "teacher_stage"} & set(args.given)
    overlaid = args.mask_type == "tubelet" and not args.add_tubelets
    problems.add(
        {
            f"--mask_ratio {ratio}: must lie between 0 and 1": not 0 < ratio < 1,
            f"--traj_unmask_ratio {unmask}: must lie between 0 and 1": not 0 <= unmask <= 1,
            "--mask_type tubelet follows pasted objects: add --add_tubelets": overlaid,
            "--use_objects pastes them only with --add_tubelets: add it": args.use_objects and not args.add_tubelets,
            f"--epoch_size: an epoch of --background {kind} is all of --data_path": args.epoch_size
            and kind not in GENERATED,
            f"--pan {args.pan}: must lie between 0 and 0.5": not 0 <= args.pan <= 0.5,
            f"--pan moves an image or frame, not --background {kind}": args.pan > 0 and kind not in ("image", "frame"),
            f"--scales {min(args.scales)}: must be at least 1": min(args.scales) < 1,
            f"--batch_size {args.batch_size} is not a multiple of the {views} clips made of each video "
            "(--num_sample, and two masks with --multiple_sampling)": uneven,
            f"--target_type dino_v1 needs --distillation_teacher {' or '.join(DINO_MODELS)}": dino,
            f"--distillation_teacher {args.distillation_teacher}: add --target_type dino_v1": unused_dino,
            "--teacher_model, --teacher_weights and --teacher_stage are of --target_type timm: add it": unused_timm,
            "--objects_path: add --use_objects, without which patches of the clips are pasted": args.objects_path
            and args.add_tubelets
            and not args.use_objects,
        }
    )
    if args.target_type == "clip":
        problems.attempt(modeling_teacher.find_clip_weights, args.clip_model, args.clip_weights, prefix="--clip_")
    if args.target_type == "timm":
        problems.attempt(check_timm_weights, args.teacher_model, args.teacher_weights, prefix="--teacher_")
    for path in filter(os.path.isfile, {args.first_stage_path, args.resume}):
        problems.attempt(check_kind, path, "encoder_to_decoder.weight", "pretraining")
    return problems


def read_videos(args: argparse.Namespace) -> VideoList:
    """List the videos or images that an epoch is made from; for black and noise, --epoch_size entries."""
    if args.background in GENERATED:
        if args.epoch_size < 1:
            raise ValueError(f"--background {args.background} needs --epoch_size, the number of clips per epoch")
        return list_of(f"--background {args.background}", [args.background] * args.epoch_size)
    if args.background == "image":
        with utils.user_errors("--"):
            return find_images(args.data_path)
    if not args.data_path:
        raise ValueError(f"--background {args.background} needs --data_path, a list of videos")
    return read_list(args.data_path, any_label, args.data_root)


def build_dataset(args: argparse.Namespace) -> PretrainDataset:
    """Build the dataset of training clips."""
    size, overlay, library = (args.input_size, args.input_size), None, None
    if args.add_tubelets:
        if args.use_objects:
            with utils.user_errors("--"):
                names = find_objects(args.objects_path, args.objects_list)
            library = ObjectLibrary(args.objects_path, names, max_side=round(320 * args.input_size / 224))
        overlay = ObjectOverlay(size, library, args.motion_type, tuple(args.scales), args.num_rois, args.speed)
    grid = token_grid(args.num_frames, *size)
    masks = MaskGenerator(args.mask_type, grid, args.mask_ratio, args.sub_mask_type, args.traj_unmask_ratio)
    source = ClipSource(size, args.num_frames, args.sampling_rate, args.background, args.pan, args.reader)
    return PretrainDataset(read_videos(args), source, masks, overlay, args.num_sample, args.seed)


def choose_teacher(args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """Build the frozen teacher, or the pixel target; its `out_dim` is the width of the targets."""
    if args.target_type == "pixel":
        return PixelTarget().to(device)
    model, weights, prefix = {
        "clip": (args.clip_model, args.clip_weights, "--clip_"),
        "dino_v1": (args.distillation_teacher, args.dino_weights, "--dino_"),
        "timm": (args.teacher_model, args.teacher_weights, "--teacher_"),
    }[args.target_type]
    if weights == "random":
        logger.warning("THE TEACHER HAS RANDOM WEIGHTS: good for trying things out, useless for results")
    grid = token_grid(args.num_frames, args.input_size, args.input_size)[1:]
    fed = (args.teacher_norm, grid, args.teacher_size or None, args.teacher_stage)
    dtype = DTYPES[pick_precision(args.precision, device)]
    with utils.user_errors(prefix):
        return modeling_teacher.build_teacher(args.target_type, model, weights, *fed, dtype).to(device)


def describe(args: argparse.Namespace, precision: str, device: torch.device, sampler: ChunkSampler) -> None:
    """Log what is about to run."""
    views, total, kind = clips_per_video(args), options.total_batch(args), args.background
    peak, final = (rate * total / 256 for rate in (args.lr, args.min_lr))
    batch = (utils.world_size(), args.batch_size, args.update_freq, total, precision, device)
    logger.info("%d process(es) x %d clips x %d accumulated = total batch %d, %s on %s", *batch)
    epoch = (sampler.num_samples, kind, views, sampler.steps_per_epoch, peak, final)
    logger.info("%d x %s, %d clips of each: %d steps per epoch; lr %.3g falling to %.3g", *epoch)
    stop = args.stop_epoch or args.epochs
    count = "training %d of %d scheduled epochs: %d as the paper counts, where every clip made of a video counts"
    logger.info(count, stop, args.epochs, stop * views)
    if kind == "black" and not args.add_tubelets:
        logger.warning("--background black without --add_tubelets: there is nothing in the clips to be learned")


def check(args: argparse.Namespace) -> None:
    """Fetch the weights that are named ``hf://…``, and raise RunError if anything is wrong with the arguments."""
    for name in ("first_stage_path", "resume", *TEACHER_WEIGHTS):
        setattr(args, name, local_path(getattr(args, name)))
    find_problems(args).raise_if_any()


def train(args: argparse.Namespace, device: torch.device) -> int:
    """Build everything, and train; returns the exit code."""
    with utils.user_errors():
        dataset = build_dataset(args)
        report = options.start_video_check(dataset.videos, args) if args.background in ("video", "frame") else None
        sampler = options.make_sampler(args, dataset, args.batch_size // clips_per_video(args))
        teacher = choose_teacher(args, device)
        sizes = {"decoder_depth": args.decoder_depth, "decoder_num_classes": teacher.out_dim}
        student = MODELS[args.model](**sizes, drop_path_rate=args.drop_path, use_checkpoint=args.use_checkpoint)
        groups = parameter_groups(student.to(device), args.weight_decay)
        stepper = options.build_stepper(args, student, groups, device, sampler.steps_per_epoch)
    describe(args, stepper.precision, device, sampler)

    contents = {"model": student, "args": args}
    run = options.start(args, dataset, sampler, stepper, contents, args.first_stage_path)
    if args.compile:
        teacher.compile(dynamic=False)
    norm = channel_stats("imagenet", device)
    if report:
        report()
    with run:
        for epoch in run.epochs():
            train_one_epoch(stepper.model, teacher, epoch, norm, args.multiple_sampling)
    return run.exit_code


if __name__ == "__main__":
    options.run_program(get_args(), check, train)
