"""Write frozen features of the videos of a list, for whatever is to be built on them.

Features are the encoder's tokens after its last block, as the probes see them: ``[V, D]`` for each video (their mean),
``[V, t, D]`` (their mean in each time step) or ``[V, N, D]`` (all of them), V views. So many lines of the list share a
file ``features-00000.npy``, one row each, in the list's order; ``index.csv`` names file and row of every video. A video
that cannot be read is a row of NaN. The same command, started again, computes the files that are missing.
"""

import argparse
import csv
import hashlib
import json
import os
import re
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import utils
from checkpoints import check_kind, load_encoder, local_path, lock_folder
from datasets_finetune import ViewReader
from evaluation import Evaluator
from lists import VideoList, label_text, read_list
from metrics import VideoScore
from modeling_finetune import MODELS, TUBELET_SIZE, VisionTransformer, token_grid
from optim_factory import DTYPES
from options import add_data_arguments, make_parser, pick_precision
from utils import RunError, SharedError, logger

# What must not change between a run and another one that goes on with it.
CLIP = ("num_frames", "sampling_rate", "input_size", "sampling", "num_segment", "num_crop")
SETTINGS = ("data_root", "checkpoint", "model", "features", "shard_size", "format", "dtype", *CLIP)
WHOLE = re.compile("-?[0-9]{1,18}")
COLUMNS = ("video", "path", "label", "file", "row", "error")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (`argv`, or sys.argv)."""
    parser = make_parser("SMILE features", __doc__)
    data = add_data_arguments(parser)
    data.add_argument("--data_path", default="", help="list with a line `path label` for each video")
    data.add_argument("--sampling", choices=("dense", "segments"), default="dense", help="segments: as SSv2 is trained")
    data.add_argument("--num_segment", type=int, default=1, help="views in time; 1: the centre")
    data.add_argument("--num_crop", type=int, default=1, help="views in space; 1: the centre")

    model = parser.add_argument_group("model")
    names = ", ".join(MODELS)
    model.add_argument("--model", choices=MODELS, metavar="NAME", default="vit_base_patch16_224", help=names)
    model.add_argument("--checkpoint", default="", help="pretrained or fine-tuned: a file, or hf://owner/repo/file")
    model.add_argument(
        "--features", choices=("mean", "time", "token"), default="mean", help="of all tokens, by step, all"
    )

    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", default="", help="folder to write")
    run.add_argument("--shard_size", type=int, default=256, help="videos a file")
    run.add_argument("--format", choices=("npy", "npz"), default="npy", help="npz: features, labels and paths together")
    run.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of what is written")
    run.add_argument("--batch_size", type=int, default=16, help="views of a video in one forward pass")
    run.add_argument("--device", default="cuda", help="cuda (where there is one) or cpu")
    precisions = ("auto", *DTYPES)
    run.add_argument("--precision", choices=precisions, default="auto", help="auto: bf16 or fp16 on a GPU, else fp32")
    return parser.parse_args(argv)


class Features(nn.Module):
    """Clips ``[B, 3, T, H, W]`` → features of each: mean ``[B, D]``, time ``[B, t, D]`` or token ``[B, N, D]``."""

    def __init__(self, encoder: VisionTransformer, kind: str):
        super().__init__()
        self.encoder, self.kind = encoder, kind

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        tokens = self.encoder.forward_tokens(clips)
        if self.kind == "time":
            return tokens.unflatten(1, (clips.shape[2] // TUBELET_SIZE, -1)).mean(dim=2)
        return tokens.mean(dim=1) if self.kind == "mean" else tokens


def check(args: argparse.Namespace, checkpoint: str) -> VideoList:
    """The list, after a look at everything that can be wrong with the arguments.

    Raises:
        RunError: something is.
    """
    for name in ("data_path", "checkpoint", "output_dir"):
        if not getattr(args, name):
            raise SharedError(f"--{name} is missing")
    for name in ("num_segment", "num_crop", "shard_size", "batch_size", "sampling_rate"):
        if getattr(args, name) < 1:
            raise SharedError(f"--{name} {getattr(args, name)}: must be at least 1")
    check_kind(checkpoint, "blocks.0.attn.qkv.weight", "SMILE or VideoMAE")
    with utils.user_errors():
        token_grid(args.num_frames, args.input_size, args.input_size)
        videos = read_list(args.data_path, label_text, args.data_root)
        videos.check_files(args.max_bad_fraction)
    return videos


def check_settings(args: argparse.Namespace, precision: str) -> None:
    """Leave ``settings.json`` in the folder, or compare with the one that is there.

    Raises:
        SharedError: the folder holds features of another list, model or kind.
    """
    settings = {name: getattr(args, name) for name in SETTINGS} | {"precision": precision}
    settings["data_path"] = hashlib.sha256(Path(args.data_path).read_bytes()).hexdigest()
    file = Path(args.output_dir) / "settings.json"
    if file.is_file():
        known = json.loads(file.read_text())
        for name, value in settings.items():
            if known.get(name) != value:
                raise SharedError(f"{file}: --{name} was {known.get(name)}, now {value}; choose another --output_dir")
    utils.barrier()  # all have looked
    if utils.rank() == 0:
        file.write_text(json.dumps(settings, indent=1) + "\n")


def write_shard(path: Path, videos: VideoList, scores: list[VideoScore], shape: tuple[int, ...], dtype: str) -> None:
    """Write a shard, after its part of the index: a shard that is there is whole.

    Args:
        scores: of each of its videos, features of `shape`, ``[V, …]``, or an error.
    """
    rows = np.full((len(scores), *shape), np.nan, dtype)
    indices = [score.index for score in scores]
    paths, labels = [videos.path(index) for index in indices], [os.fsdecode(label) for label in videos.labels[indices]]
    for row, score in zip(rows, scores):
        if not score.error:
            row[:] = score.views
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        for row, (score, video, label) in enumerate(zip(scores, paths, labels)):
            csv.writer(file).writerow([score.index, video, label, path.name, row, score.error])
    draft = path.with_suffix(".tmp")
    with open(draft, "wb") as file:
        if path.suffix == ".npz":
            numbers = np.array(labels, np.int64) if all(map(WHOLE.fullmatch, labels)) else labels
            np.savez(file, features=rows, labels=numbers, paths=paths)
        else:
            np.save(file, rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def write_index(folder: Path, shards: list[Path]) -> list[list[str]]:
    """Join the parts of the index; returns the lines of videos that could not be read."""
    lines: list[list[str]] = []
    for shard in shards:
        with open(shard.with_suffix(".csv"), newline="") as file:
            lines += csv.reader(file)
    with open(folder / "index.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *lines])
    return [line for line in lines if line[-1]]


def main(args: argparse.Namespace) -> int:
    """Check, compute the shards that are missing, and join the index; returns the exit code."""
    device = utils.init_distributed(args.device, timeout_minutes=24 * 60)  # processes may finish far apart
    utils.setup_logging()
    checkpoint, folder = local_path(args.checkpoint), Path(args.output_dir)
    videos, precision = check(args, checkpoint), pick_precision(args.precision, device)
    lock = lock_folder(args.output_dir) if utils.rank() == 0 else None
    utils.barrier()
    check_settings(args, precision)

    encoder = MODELS[args.model](num_classes=0)
    load_encoder(encoder, checkpoint)
    model = Features(encoder, args.features).to(device)
    segments, crops = args.num_segment, args.num_crop
    views = ViewReader(args.sampling, segments, crops, args.input_size, args.num_frames, args.sampling_rate)
    evaluator = Evaluator(
        device, precision, 0, lambda name: videos, views, views, args.num_workers, args.worker_timeout
    )

    t, h, w = token_grid(args.num_frames, args.input_size, args.input_size)
    shape = (segments * crops, *{"mean": (), "time": (t,), "token": (t * h * w,)}[args.features], encoder.embed_dim)
    shards = {
        folder / f"features-{start // args.shard_size:05d}.{args.format}": range(len(videos))[start:][: args.shard_size]
        for start in range(0, len(videos), args.shard_size)
    }
    missing = utils.broadcast([shard for shard in shards if not shard.is_file()])
    logger.info("%d videos, %d of %d files to compute, features %s", len(videos), len(missing), len(shards), shape)

    mine = missing[utils.rank() :: utils.world_size()]
    samples = evaluator.loader(videos, views, [index for shard in mine for index in shards[shard]])
    for shard in mine:
        some = islice(samples, len(shards[shard]))
        scores = evaluator.scores(model, some, shard.name, args.batch_size, finish=lambda tokens: tokens)
        write_shard(shard, videos, scores, shape, args.dtype)
    utils.barrier()
    if utils.rank() == 0:
        bad = write_index(folder, list(shards))
        logger.info("%s: %d videos, %d of them unreadable", folder / "index.csv", len(videos), len(bad))
        if len(bad) > args.max_bad_fraction * len(videos):
            raise RunError(
                f"{len(bad)} of {len(videos)} videos could not be read, more than --max_bad_fraction "
                f"{args.max_bad_fraction}; the first: {bad[0][1]}: {bad[0][-1]}"
            )
    del lock
    return 0


if __name__ == "__main__":
    utils.run_main(main, get_args())
