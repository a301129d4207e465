"""Write the frozen features of the videos of a list, for whatever is to be built on them.

    torchrun --nproc_per_node 8 run_feature_extraction.py --data_path list.csv --checkpoint checkpoint-149.pth \\
        --output_dir features

Features are the encoder's tokens after its last block, as the probes see them: float ``[V, D]`` for each video (mean
over tokens), ``[V, t, D]`` (for each time step) or ``[V, N, D]`` (every token), V views. `--shard_size` lines of the
list share a file ``features-00000.npy``, rows in the list's order; ``index.csv`` tells the file and row of each video.
A video that cannot be read is a row of NaN. The same command, started again, computes the files that are missing.
"""

import argparse
import csv
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
from checkpoints import check_kind, load_encoder, local_path
from data_loading import BadFiles, init_worker, unbatched
from datasets import EvalDataset, EvalSample, VideoList, ViewReader
from engine_for_pretraining import normalize_clips
from modeling_finetune import MODELS, VisionTransformer, token_grid
from modeling_teacher import channel_stats
from optim_factory import DTYPES, autocast
from options import add_data_arguments, number_problems, path_problems, pick_precision
from utils import RunError, SharedError, logger

DECIDING = (  # what must not change between a run and the one that goes on with it
    "data_path", "data_root", "checkpoint", "model", "features", "sampling", "num_segment", "num_crop", "num_frames",
    "sampling_rate", "input_size", "shard_size", "format", "dtype", "precision",
)  # fmt: skip


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line (`argv`, or sys.argv)."""
    parser = argparse.ArgumentParser(
        "SMILE features",
        "%(prog)s [options]; --help lists them",
        __doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = add_data_arguments(parser)
    data.add_argument("--data_path", required=True, help="list with a line `path label` for each video")
    data.add_argument(
        "--sampling", choices=("dense", "segments"), default="dense", help="as in fine-tuning (segments: SSv2)"
    )
    data.add_argument("--num_segment", type=int, default=1, help="views in time (default 1, the centre)")
    data.add_argument("--num_crop", type=int, default=1, help="views in space (default 1, the centre)")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", choices=MODELS, metavar="NAME", default="vit_base_patch16_224", help=", ".join(MODELS)
    )
    model.add_argument("--checkpoint", required=True, help="pretrained or fine-tuned, a file or hf://owner/repo/file")
    model.add_argument(
        "--features", choices=("mean", "time", "token"), default="mean", help="tokens averaged over what"
    )

    run = parser.add_argument_group("run")
    run.add_argument("--output_dir", required=True, help="folder to write")
    run.add_argument("--shard_size", type=int, default=256, help="videos a file")
    run.add_argument("--format", choices=("npy", "npz"), default="npy", help="npz: features, labels and paths together")
    run.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of what is written")
    run.add_argument("--batch_size", type=int, default=16, help="views of a video in a forward pass")
    run.add_argument("--device", default="cuda", help="cuda (where there is one) or cpu")
    run.add_argument("--precision", choices=("auto", *DTYPES), default="auto", help="auto: as in training")
    return parser.parse_args(argv)


def find_problems(args: argparse.Namespace) -> list[str]:
    """Everything wrong with the arguments that can be seen without building a model."""
    problems = path_problems(args, ("checkpoint",))
    for check, *values in (
        (check_kind, args.checkpoint, "blocks.0.attn.qkv.weight", "SMILE or VideoMAE"),
        (token_grid, args.num_frames, args.input_size, args.input_size),
        (lambda: VideoList(args.data_path, None, args.data_root).check_files(args.max_bad_fraction),),
    ):
        try:
            check(*values)
        except (ValueError, OSError, RunError) as error:
            problems.append(str(error))
    numbers = ("num_segment", "num_crop", "shard_size", "batch_size", "sampling_rate")
    return problems + number_problems(args, numbers)
