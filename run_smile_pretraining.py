"""Pretrain SMILE: the command line, the model and data built from it, and the loop over epochs.

Stage 1 pastes moving objects (``--add_tubelets --mask_type tubelet``); stage 2 starts from its weights
(``--first_stage_path``) on natural clips with a tube mask. In these two flags, as in the released code, a tubelet is a
pasted object with its path; everywhere else it is VideoMAE's: the two frames of a patch that make a token.
scripts/pretrain/ holds the recipes.
"""

import argparse
import os

import torch

import options
import utils
from checkpoints import Position
from datasets import ChunkSampler, PretrainDataset, VideoCheck, build_loader, find_images
from engine_for_pretraining import train_one_epoch
from lists import VideoList, any_label, list_of, read_list
from masking_generator import MASK_TYPES, SUB_MASK_TYPES, MaskGenerator
from modeling_finetune import PATCH_SIZE, TUBELET_SIZE, channel_stats, token_grid
from modeling_pretrain import MODELS
from modeling_teacher import (
    DINO_MODELS,
    TARGET_TYPES,
    TEACHER_NORMS,
    PixelTarget,
    build_teacher,
    check_timm_weights,
    find_clip_weights,
)
from object_overlay import MOTION_TYPES, SCALES, ObjectLibrary, ObjectOverlay, find_objects
from optim_factory import DTYPES, Stepper, distribute, parameter_groups
from options import Problems, RunOptions
from training import Run, resume, set_up
from utils import logger
from video_transforms import BACKGROUNDS, ClipSource
from weights import check_kind, load_strictly, local_path


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (`argv`, or sys.argv)."""
    parser = options.make_parser("SMILE pretraining", __doc__)

    data = options.add_data_arguments(parser)
    path = "list file, `path label` a line (the label is not used); of --background image a folder; else none"
    data.add_argument("--data_path", default="", help=path)
    kinds = "source of the base clip: window of a video, black, uniform noise, image, or one frame of a video"
    data.add_argument("--background", choices=BACKGROUNDS, default="video", help=kinds)
    data.add_argument("--epoch_size", type=int, default=0, help="clips an epoch, of --background black and noise")
    pan = "share of its short side that an image or frame moves in the course of a clip"
    data.add_argument("--pan", type=float, default=0.0, help=pan)
    data.add_argument("--num_sample", type=int, default=1, help="clips (crop, overlay, mask) from each decoded window")

    overlay = parser.add_argument_group("overlay (stage 1)")
    overlay.add_argument("--add_tubelets", action="store_true", help="paste moving objects on the clips")
    overlay.add_argument("--use_objects", action="store_true", help="object images; without it patches of the clip")
    overlay.add_argument("--objects_path", default="", help="folder with <category>/<name>.png")
    overlay.add_argument("--objects_list", default="", help="file that narrows the objects, a relative path a line")
    overlay.add_argument("--motion_type", choices=MOTION_TYPES, default="gaussian", help="how objects move")
    overlay.add_argument("--scales", type=int, nargs="+", default=list(SCALES), help="box sides, pixels of 224")
    overlay.add_argument("--num_rois", type=int, default=2, help="objects a clip")
    speed = "factor on how far objects move, and how much they turn and grow; 0: they stand still"
    overlay.add_argument("--speed", type=float, default=1.0, help=speed)

    mask = parser.add_argument_group("mask")
    mask.add_argument("--mask_type", choices=MASK_TYPES, default="tube", help="tubelet follows the pasted objects")
    mask.add_argument("--sub_mask_type", choices=SUB_MASK_TYPES, default="tube+traj_mask", help="of tubelet")
    mask.add_argument("--mask_ratio", type=float, default=0.8, help="part of the tokens hidden from the encoder")
    mask.add_argument("--traj_unmask_ratio", type=float, default=0.1, help="part of the object tokens left visible")
    mask.add_argument("--multiple_sampling", action="store_true", help="train each clip with two masks")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", choices=MODELS, metavar="NAME", default="pretrain_videomae_base_patch16_224", help=", ".join(MODELS)
    )
    model.add_argument("--decoder_depth", type=int, default=4, help="decoder blocks")
    model.add_argument("--drop_path", type=float, default=0.0, help="stochastic depth rate of the last block")
    model.add_argument("--use_checkpoint", action="store_true", help="recompute activations to save memory")
    model.add_argument("--first_stage_path", default="", help="stage 1 checkpoint whose weights to start from")

    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--target_type", choices=TARGET_TYPES, default="clip", help="what is reconstructed")
    teachers = ("clip_b", *DINO_MODELS)
    teacher.add_argument("--distillation_teacher", choices=teachers, default="clip_b", help="dino_*: of dino_v1")
    teacher.add_argument("--clip_model", default="ViT-B-16", help="open_clip model")
    teacher.add_argument("--clip_weights", default="openai", help="open_clip tag, local file, or `random` for tests")
    teacher.add_argument("--dino_weights", default="timm", help="`timm` to fetch them, local file, or `random`")
    dinov2 = "vit_small_patch14_reg4_dinov2.lvd142m"
    teacher.add_argument("--teacher_model", default=dinov2, help="timm model, of target timm")
    weights = "`timm` to fetch the model's own, hf-hub:OWNER/NAME, local file, or `random`"
    teacher.add_argument("--teacher_weights", default="timm", help=weights)
    teacher.add_argument("--teacher_stage", type=int, default=-1, help="which of its intermediate features; -1: last")
    norm = "normalisation of its frames; the released models used ImageNet's; own: the model's"
    teacher.add_argument("--teacher_norm", choices=TEACHER_NORMS, default="imagenet", help=norm)
    teacher.add_argument("--teacher_size", type=int, default=0, help="side of its frames, pixels; 0: the model's own")

    optim = options.add_optimizer_arguments(parser)
    optim.add_argument("--batch_size", type=int, default=32, help="clips a GPU and forward pass, all masks counted")
    parser.set_defaults(epochs=801, opt_betas=[0.9, 0.95], lr=1.5e-4, min_lr=1e-5, warmup_epochs=40)
    options.add_run_arguments(parser)
    return options.parse(parser, argv)


def clips_per_video(args: argparse.Namespace) -> int:
    """Training clips made of each video an epoch: views times masks."""
    return args.num_sample * (2 if args.multiple_sampling else 1)


def find_problems(args: argparse.Namespace) -> Problems:
    """Everything wrong with the arguments that can be seen without building a model."""
    problems, tubelet, unmask = Problems(args), args.mask_type == "tubelet", args.traj_unmask_ratio
    problems.files("first_stage_path", "resume")
    problems.numbers(0, "decoder_depth", "speed")
    problems.numbers(1, "num_rois")

    grid = problems.attempt(token_grid, args.num_frames, args.input_size, args.input_size, prefix="--")
    if grid and 0 < args.mask_ratio < 1:
        problems.attempt(MaskGenerator, args.mask_type, grid, args.mask_ratio, prefix="--")
    kind, videos, views = args.background, problems.attempt(read_videos, args), clips_per_video(args)
    if videos and kind not in ("black", "noise"):
        problems.attempt(videos.check_files, args.max_bad_fraction)
    if args.add_tubelets and args.use_objects:
        problems.attempt(find_objects, args.objects_path, args.objects_list, prefix="--")
    problems.add(
        {
            f"--mask_ratio {args.mask_ratio}: must lie between 0 and 1": not 0 < args.mask_ratio < 1,
            f"--traj_unmask_ratio {unmask}: must lie between 0 and 1": not 0 <= unmask <= 1,
            "--mask_type tubelet follows pasted objects: add --add_tubelets": tubelet and not args.add_tubelets,
            "--use_objects pastes them only with --add_tubelets: add it": args.use_objects and not args.add_tubelets,
            f"--epoch_size: an epoch of --background {kind} is its list": args.epoch_size
            and kind not in ("black", "noise"),
            f"--pan {args.pan}: must lie between 0 and 0.5": not 0 <= args.pan <= 0.5,
            f"--pan moves an image or frame, not --background {kind}": args.pan > 0 and kind not in ("image", "frame"),
            f"--scales {min(args.scales)}: must be at least 1": min(args.scales) < 1,
            f"--batch_size {args.batch_size} is not a multiple of the {views} clips made of each video "
            "(--num_sample, and two masks with --multiple_sampling)": min(args.num_sample, args.batch_size) < 1
            or args.batch_size % max(1, views) > 0,
            f"--target_type dino_v1 needs --distillation_teacher {' or '.join(DINO_MODELS)}": args.target_type
            == "dino_v1"
            and args.distillation_teacher not in DINO_MODELS,
        }
    )
    if args.target_type == "clip":
        problems.attempt(find_clip_weights, args.clip_model, args.clip_weights, prefix="--clip_")
    if args.target_type == "timm":
        problems.attempt(check_timm_weights, args.teacher_model, args.teacher_weights, prefix="--teacher_")
    for path in filter(os.path.isfile, {args.first_stage_path, args.resume}):
        problems.attempt(check_kind, path, "encoder_to_decoder.weight", "pretraining")
    return problems


def read_videos(args: argparse.Namespace) -> VideoList:
    """The videos or images that the clips of an epoch are made from; of black and noise --epoch_size entries."""
    if args.background in ("black", "noise"):
        if args.epoch_size < 1:
            raise ValueError(f"--background {args.background} needs --epoch_size, clips an epoch")
        return list_of(f"--background {args.background}", [args.background] * args.epoch_size)
    if args.background == "image":
        with utils.user_errors("--"):
            return find_images(args.data_path)
    if not args.data_path:
        raise ValueError(f"--background {args.background} needs --data_path, a list of videos")
    return read_list(args.data_path, any_label, args.data_root)


def build_dataset(args: argparse.Namespace) -> PretrainDataset:
    """The training clips that the arguments describe."""
    size = (args.input_size, args.input_size)
    overlay = None
    if args.add_tubelets:
        library = None
        if args.use_objects:
            with utils.user_errors("--"):
                names = find_objects(args.objects_path, args.objects_list)
            library = ObjectLibrary(args.objects_path, names, max_side=round(320 * args.input_size / 224))
        overlay = ObjectOverlay(size, library, args.motion_type, tuple(args.scales), args.num_rois, args.speed)
    grid, ratio, patch = token_grid(args.num_frames, *size), args.traj_unmask_ratio, (PATCH_SIZE, PATCH_SIZE)
    masks = MaskGenerator(args.mask_type, grid, args.mask_ratio, args.sub_mask_type, ratio, patch, TUBELET_SIZE)
    source = ClipSource(size, args.num_frames, args.sampling_rate, args.background, args.pan, args.reader)
    return PretrainDataset(read_videos(args), source, masks, overlay, args.num_sample, args.seed)


def choose_teacher(args: argparse.Namespace, device: torch.device) -> torch.nn.Module:
    """The frozen network, or the pixels, that give the targets; its `out_dim` is the target's width."""
    if args.target_type == "pixel":
        return PixelTarget(PATCH_SIZE, TUBELET_SIZE).to(device)
    model, weights, prefix = {
        "clip": (args.clip_model, args.clip_weights, "--clip_"),
        "dino_v1": (args.distillation_teacher, args.dino_weights, "--dino_"),
        "timm": (args.teacher_model, args.teacher_weights, "--teacher_"),
    }[args.target_type]
    if weights == "random":
        logger.warning("THE TEACHER HAS RANDOM WEIGHTS: good for trying things out, useless for results")
    grid = token_grid(args.num_frames, args.input_size, args.input_size)[1:]
    fed = (args.teacher_norm, grid, args.teacher_size or None, args.teacher_stage)
    dtype = DTYPES[options.pick_precision(args.precision, device)]
    with utils.user_errors(prefix):
        return build_teacher(args.target_type, model, weights, *fed, dtype).to(device)


def describe(args: argparse.Namespace, stepper: Stepper, sampler: ChunkSampler, total_batch: int) -> None:
    """Say what is about to run."""
    views, stop = clips_per_video(args), args.stop_epoch or args.epochs
    peak, final = (rate * total_batch / 256 for rate in (args.lr, args.min_lr))
    batch = (utils.world_size(), args.batch_size, args.update_freq, total_batch, stepper.precision, stepper.device)
    logger.info("%d process(es) x %d clips x %d accumulated = total batch %d, %s on %s", *batch)
    epoch = (sampler.num_samples, args.background, views, sampler.steps_per_epoch, peak, final)
    logger.info("%d x %s, %d clips of each: %d steps an epoch; lr %.3g falling to %.3g", *epoch)
    count = "epochs %d of a schedule of %d: %d in the paper's count, where every clip made of a video counts"
    logger.info(count, stop, args.epochs, stop * views)
    if args.background == "black" and not args.add_tubelets:
        logger.warning("--background black without --add_tubelets: there is nothing in the clips to be learned")


def check(args: argparse.Namespace) -> None:
    """Fetch the weights that are named ``hf://…``, and raise RunError if anything is wrong with the arguments."""
    for name in ("first_stage_path", "resume", "clip_weights"):
        setattr(args, name, local_path(getattr(args, name)))
    find_problems(args).tell()


def train(args: argparse.Namespace, device: torch.device) -> int:
    """Build everything, and train; returns the exit code."""
    with utils.user_errors():
        dataset = build_dataset(args)
        watched = args.background in ("video", "frame") and utils.rank() == 0
        look = VideoCheck(dataset.videos, args.input_size, args.reader) if watched else None
        chunk = args.batch_size // clips_per_video(args)
        sampler = ChunkSampler(len(dataset), chunk, args.update_freq, utils.rank(), utils.world_size(), args.seed)
        teacher = choose_teacher(args, device)
        sizes = {"decoder_depth": args.decoder_depth, "decoder_num_classes": teacher.out_dim}
        student = MODELS[args.model](**sizes, drop_path_rate=args.drop_path, use_checkpoint=args.use_checkpoint)
        student = student.to(device)
        total_batch = args.batch_size * args.update_freq * utils.world_size()
        groups = parameter_groups(student, args.weight_decay)
        stepper = options.build_stepper(args, student, groups, device, total_batch, sampler.steps_per_epoch)
    describe(args, stepper, sampler, total_batch)

    contents = {"model": student, "args": args}
    position = resume(args, contents, stepper, sampler.samples_per_step)
    if position and args.first_stage_path:
        logger.warning("--first_stage_path was for the start of this run, which has gone further: resuming wins")
    elif args.first_stage_path:
        load_strictly(student, args.first_stage_path)
    if args.compile:
        student.compile(dynamic=False)
        teacher.compile(dynamic=False)
    stepper.model = distribute(student, device)
    pin_memory = args.pin_mem and device.type == "cuda"
    loader = build_loader(dataset, sampler, args.num_workers, pin_memory, args.worker_timeout)
    norm = channel_stats("imagenet", device)

    if look:
        look.tell()
    with Run(RunOptions.of(args), position or Position(args.start_epoch), loader, stepper, contents) as run:
        for epoch in run.epochs():
            train_one_epoch(stepper.model, teacher, epoch, norm, args.multiple_sampling)
    return run.exit_code


def main(args: argparse.Namespace) -> int:
    """The program; returns the exit code."""
    with set_up(args, check) as device:
        return train(args, device)


if __name__ == "__main__":
    utils.run_main(main, get_args())
