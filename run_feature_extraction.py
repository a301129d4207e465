"""Write frozen features of the videos of a list.

Features are the encoder's tokens after its last block, as the probes see them: of V views of a video ``[V, D]`` (mean),
``[V, t, D]`` (mean of each time step) or ``[V, N, D]`` (all). Each file ``features-00000.npy`` holds --shard_size lines
of the list, one row each; ``index.csv`` has file, row and seconds of every video. Unreadable videos are rows of NaN.

--stride N or --stride_seconds S is for temporal localisation: a window every N frames or S seconds of the whole video,
``[n_windows, D]`` in a file for each video, ``<name>.npy``. ``index.csv`` then has a line for each window, and
``windows.json`` has the frames and stride of a window, and the rate and length of each video.

The same command, started again, computes the missing files.
"""

import argparse
import csv
import hashlib
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

import utils
from datasets_finetune import DATA_SETS, SAMPLINGS, Span, ViewReader, WindowReader
from evaluation import load_views, score_videos, write_table
from lists import VideoList, label_text, read_list
from meters import check_bad_fraction
from metrics import VideoScore
from modeling_finetune import MODELS, token_grid
from modeling_probe import Features
from optim_factory import DTYPES, pick_precision
from options import add_data_arguments, follow, make_parser, parse, run_program, start_video_check, trained_with
from utils import RunError, logger
from weights import check_kind, load_encoder, local_path

# Options that must not change when a run is resumed.
WINDOW_OPTIONS = ("num_frames", "sampling_rate", "input_size")
VIEW_OPTIONS = (*WINDOW_OPTIONS, "sampling", "num_segment", "num_crop")
UNCHANGED = (
    "data_root", "checkpoint", "model", "features", "shard_size", "format", "dtype", "stride", "stride_seconds",
    *VIEW_OPTIONS,
)  # fmt: skip
WHOLE = re.compile("-?[0-9]{1,18}")
COLUMNS = ("video", "path", "label", "file", "row", "start", "end", "rate", "frames", "error")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (`argv`, or sys.argv)."""
    parser = make_parser("SMILE features", __doc__)
    add = add_data_arguments(parser)
    add("--data_path", default="", help="list with a line `path label` for each video")
    add("--sampling", choices=SAMPLINGS, default="dense", help="segments: as SSv2 is trained")
    add("--num_segment", type=int, default=1, help="views in time; 1: the centre")
    add("--num_crop", type=int, default=1, help="views in space; 1: the centre")
    add("--stride", type=int, default=0, help="frames between windows over the whole video; 0: no windows")
    add("--stride_seconds", type=float, default=0.0, help="seconds between windows")

    add = parser.add_argument_group("model").add_argument
    add("--model", choices=MODELS, metavar="NAME", default="vit_base_patch16_224", help=", ".join(MODELS))
    add("--checkpoint", default="", help="pretrained or fine-tuned: a file, or hf://owner/repo/file")
    add("--features", choices=("mean", "time", "token"), default="mean", help="mean of tokens, by time step, or all")

    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="", help="folder of the output")
    add("--shard_size", type=int, default=256, help="videos per file")
    add("--format", choices=("npy", "npz"), default="npy", help="npz: features, labels and paths together")
    add("--dtype", choices=("float32", "float16"), default="float32", help="type of the features")
    add("--batch_size", type=int, default=16, help="views of a video per forward pass")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cuda: where there is one")
    add("--precision", choices=("auto", *DTYPES), default="auto", help="auto: bf16 or fp16 on a GPU, else fp32")
    return parse(parser, argv)


def is_windows(args: argparse.Namespace) -> bool:
    """Whether features are extracted from windows over the whole video."""
    return bool(args.stride or args.stride_seconds)


def check(args: argparse.Namespace) -> None:
    """Complete the arguments from the checkpoint, and raise RunError if anything is wrong with them."""
    checkpoint = local_path(args.checkpoint)
    if os.path.exists(checkpoint):
        stored = trained_with(checkpoint)
        if stored.get("data_set") in DATA_SETS:
            stored["sampling"] = DATA_SETS[stored["data_set"]].sampling
        follow(args, stored, checkpoint, ("model", *(WINDOW_OPTIONS if is_windows(args) else VIEW_OPTIONS)))
    for name in ("data_path", "checkpoint", "output_dir"):
        if not getattr(args, name):
            raise RunError(f"--{name} is missing")
    from_one = ("num_segment", "num_crop", "shard_size", "batch_size", "sampling_rate")
    for least, names in ((1, from_one), (0, ("num_workers", "worker_timeout"))):
        for name in names:
            if not getattr(args, name) >= least:
                raise RunError(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.stride < 0 or not 0 <= args.stride_seconds < math.inf or (args.stride and args.stride_seconds):
        raise RunError("--stride and --stride_seconds: give one of them, above 0")
    if is_windows(args) and (args.num_segment, args.num_crop, args.sampling, args.format) != (1, 1, "dense", "npy"):
        raise RunError("--stride: windows are dense and central, in .npy files; omit the options of views")
    check_kind(checkpoint, "blocks.0.attn.qkv.weight", "SMILE or VideoMAE")
    with utils.user_errors("--"):
        token_grid(args.num_frames, args.input_size, args.input_size)
    with utils.user_errors():
        read_list(args.data_path, label_text, args.data_root).check_files(args.max_bad_fraction)


def check_unchanged(args: argparse.Namespace, encoder: torch.nn.Module, precision: str) -> None:
    """Write ``settings.json`` into the folder, after comparing with the one that is there.

    Raises:
        RunError: the folder holds features of another list, model or kind.
    """
    settings = {name: getattr(args, name) for name in UNCHANGED} | {"precision": precision}
    settings["data_path"] = hashlib.sha256(Path(args.data_path).read_bytes()).hexdigest()
    weights = hashlib.sha256()
    for value in encoder.state_dict().values():
        weights.update(value.numpy())
    settings["checkpoint (its weights)"] = weights.hexdigest()  # a file may be written again
    file = Path(args.output_dir) / "settings.json"
    if file.is_file():
        known = json.loads(file.read_text())
        for name, value in settings.items():
            if known.get(name, value) != value:  # an earlier version may not have written all of them
                raise RunError(f"{file}: --{name} was {known.get(name)}, now {value}; choose another --output_dir")
    utils.barrier()  # all have looked
    if utils.rank() == 0:
        file.write_text(json.dumps(settings, indent=1) + "\n")


def part_of(path: Path, windows: bool) -> Path:
    """Return the path of the part of the index that belongs to a file of features."""
    return path.with_suffix(".windows.csv" if windows else ".csv")


def write_shard(path: Path, videos: VideoList, scores: list[VideoScore], shape: tuple[int, ...], dtype: str) -> None:
    """Write features of some videos, after their part of the index, so that a file that exists is complete.

    Args:
        scores: features of each video, ``[V, …]`` of this shape, or an error.
    """
    features, rows = np.full((len(scores), *shape), np.nan, dtype), []
    for row, score in enumerate(scores):
        if not score.error:
            features[row] = score.views
        spans = score.spans or [Span(np.nan, np.nan, np.nan, 0)]
        shown = (min(span.start for span in spans), max(span.end for span in spans), *spans[0][2:])
        rows.append([score.index, *named(videos, score.index), path.name, row, *shown, score.error])
    write_table(part_of(path, windows=False), rows)
    if path.suffix == ".npy":
        utils.write_atomically(path, lambda file: np.save(file, features))
        return
    paths, labels = zip(*(named(videos, score.index) for score in scores))
    numbers = np.array(labels, np.int64) if all(map(WHOLE.fullmatch, labels)) else labels
    utils.write_atomically(path, lambda file: np.savez(file, features=features, labels=numbers, paths=paths))


def write_windows(path: Path, folder: Path, videos: VideoList, score: VideoScore, dtype: str) -> None:
    """Write the windows of a video, after their part of the index; of an unreadable video only that part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = [score.index, *named(videos, score.index)]
    rows = [[*known, str(path.relative_to(folder)), row, *span, ""] for row, span in enumerate(score.spans)]
    write_table(part_of(path, windows=True), rows or [[*known, *[""] * 6, score.error]])
    if not score.error:
        utils.write_atomically(path, lambda file: np.save(file, score.views.astype(dtype)))


def named(videos: VideoList, index: int) -> tuple[str, str]:
    """Return path and label of a video."""
    return videos.path(index), os.fsdecode(videos.labels[index])


def write_index(args: argparse.Namespace, files: list[Path]) -> list[list[str]]:
    """Join the parts of the index, and describe the windows; returns the lines of videos that could not be read."""
    folder, lines = Path(args.output_dir), list[list[str]]()
    for path in files:
        with open(part_of(path, is_windows(args)), newline="", errors="surrogateescape") as file:
            lines += csv.reader(file)
    write_table(folder / "index.csv", [list(COLUMNS), *lines])
    if is_windows(args):
        readable = [line for line in lines if not line[-1]]
        windows = Counter(line[3] for line in readable)
        known = {line[3]: {"rate": float(line[7]), "frames": int(line[8])} for line in readable}
        stride = {"stride_seconds": args.stride_seconds} if args.stride_seconds else {"stride": args.stride}
        window = {"window": args.num_frames * args.sampling_rate, "sampling_rate": args.sampling_rate, **stride}
        of_each = {name.removesuffix(".npy"): {"windows": windows[name], **values} for name, values in known.items()}
        (folder / "windows.json").write_text(json.dumps({**window, "videos": of_each}, indent=1) + "\n")
    return [line for line in lines if line[-1]]


def files_to_write(args: argparse.Namespace, videos: VideoList) -> dict[Path, list[int]]:
    """List the files of features, each with the lines of the list whose features it holds.

    Windows have a file for each video: its name, or if two have the same, its path below their common folder.

    Raises:
        RunError: windows of a video that is in the list twice.
    """
    folder = Path(args.output_dir)
    if not is_windows(args):
        shards = [range(len(videos))[start:][: args.shard_size] for start in range(0, len(videos), args.shard_size)]
        return {folder / f"features-{number:05d}.{args.format}": list(shard) for number, shard in enumerate(shards)}
    paths = [Path(os.path.abspath(videos.path(index))) for index in range(len(videos))]
    names = [path.with_suffix(".npy").name for path in paths]
    if len(set(names)) < len(names):
        root = os.path.commonpath([path.parent for path in paths])
        names = [f"{path.relative_to(root)}.npy" for path in paths]
    if len(set(names)) < len(names):
        raise RunError(f"{videos.source}: {Counter(names).most_common(1)[0][0]} is in the list twice")
    return {folder / name: [index] for index, name in enumerate(names)}


def extract(args: argparse.Namespace, videos: VideoList, model: Features, device: torch.device) -> list[Path]:
    """Compute and write the missing files, each process its share of them; returns all files."""
    t, h, w = token_grid(args.num_frames, args.input_size, args.input_size)
    tokens = {"mean": (), "time": (t,), "token": (t * h * w,)}[args.features]
    shape = (args.num_segment * args.num_crop, *tokens, model.encoder.embed_dim)
    files = files_to_write(args, videos)
    missing = utils.broadcast([file for file in files if not file.is_file()])
    logger.info("%d videos, %d of %d files to compute, features %s", len(videos), len(missing), len(files), shape[1:])

    file_of = {index: file for file in missing[utils.rank() :: utils.world_size()] for index in files[file]}
    ready: dict[Path, list[VideoScore]] = {}
    frames = (args.input_size, args.num_frames, args.sampling_rate, 0, args.reader)
    views = ViewReader(args.sampling, args.num_segment, args.num_crop, *frames)
    if is_windows(args):
        views = WindowReader("dense", 0, 1, *frames, args.stride_seconds or args.stride, bool(args.stride_seconds))
    samples = load_views(videos, views, args.num_workers, args.worker_timeout, args.batch_size, list(file_of))
    for score in score_videos(model, samples, device, pick_precision(args.precision, device), "features"):
        file = file_of[score.index]
        if is_windows(args):
            write_windows(file, Path(args.output_dir), videos, score, args.dtype)
            continue
        ready.setdefault(file, []).append(score)
        if len(ready[file]) == len(files[file]):
            scores = sorted(ready.pop(file), key=lambda score: score.index)
            write_shard(file, videos, scores, shape, args.dtype)
    return list(files)


def run(args: argparse.Namespace, device: torch.device) -> int:
    """Compute the files that are missing, and join the index; returns the exit code."""
    checkpoint, folder = local_path(args.checkpoint), Path(args.output_dir)
    videos = read_list(args.data_path, label_text, args.data_root)
    encoder = MODELS[args.model](num_classes=0)
    load_encoder(encoder, checkpoint)
    utils.barrier()  # the first process has made the folder
    check_unchanged(args, encoder, pick_precision(args.precision, device))
    report = start_video_check(videos, args)
    model = Features(encoder, args.features).to(device)
    report()
    files = extract(args, videos, model, device)
    utils.barrier()
    if utils.rank() == 0:
        bad = write_index(args, files)
        logger.info("%s: %d videos, %d of them unreadable", folder / "index.csv", len(videos), len(bad))
        first = f"the first: {bad[0][1]}: {bad[0][-1]}" if bad else ""
        check_bad_fraction(len(bad), len(videos), args.max_bad_fraction, first)
    return 0


if __name__ == "__main__":
    run_program(get_args(), check, run, timeout_minutes=24 * 60)  # processes may finish far apart
