"""Paint what pretraining does: clip, overlay with boxes, mask, and the loss of every hidden token.

    python scripts/visualize.py --output picture.png output/stage1/checkpoint-149.pth [more checkpoints]

Data, teacher and student are rebuilt from the arguments stored in each checkpoint; paths that have moved since can be
given anew. One column a time step (a tubelet); a run without overlay has no overlay row.
"""

import argparse
import sys
from itertools import cycle
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoints import load_strictly, read_checkpoint
from datasets import PretrainDataset, pretrain_indices, read_frames, sample_rng
from modeling_finetune import TUBELET_SIZE, token_grid
from modeling_pretrain import MODELS
from modeling_teacher import build_teacher
from run_smile_pretraining import build_dataset
from utils import RunError, run_main, setup_logging, user_errors
from video_transforms import channel_stats, multi_scale_crop, normalize_clips

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = tuple[str, np.ndarray]  # label, one image for each time step [t, h, w(, 3)]
MOVABLE = ("data_path", "data_root", "objects_path", "clip_weights", "dino_weights")  # arguments that may be replaced
COLOURS = ((255, 255, 0), (0, 255, 255), (255, 0, 255), (0, 255, 0))


def draw_sample(
    dataset: PretrainDataset, index: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
    """A training sample in its steps.

    Returns:
        natural clip and clip with overlay, uint8 ``[T, H, W, 3]``; boxes ``[K, T, 4]`` or None; mask bool ``[N]``.
    """
    rng = sample_rng(seed, 0, index)
    frames = read_frames(
        dataset.videos.path(index), lambda total: pretrain_indices(rng, total, dataset.num_frames, dataset.stride)
    )
    clip = multi_scale_crop(rng, frames, dataset.size)
    natural = clip.copy()
    boxes = dataset.overlay(rng, clip) if dataset.overlay else None
    return natural, clip, boxes, dataset.masks(rng, boxes)


@torch.inference_mode()
def token_losses(student: torch.nn.Module, teacher: torch.nn.Module, clip: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean squared error of every token over channels, ``[N]``; NaN where the token was visible."""
    clips = normalize_clips(torch.from_numpy(clip).permute(3, 0, 1, 2)[None], *channel_stats("imagenet"))
    masks = torch.from_numpy(mask)[None]
    error = (student(clips, masks) - teacher(clips)[masks][None]).square().mean(dim=2)
    losses = np.full(mask.shape, np.nan, dtype=np.float32)
    losses[mask] = error[0].numpy()
    return losses


def sample_rows(checkpoint: str, args: argparse.Namespace, indices: list[int], seed: int) -> list[list[Row]]:
    """Rows of images for each sample of a run."""
    with user_errors():
        dataset, teacher = build_dataset(args), build_teacher(args)
    student = MODELS[args.model](decoder_depth=args.decoder_depth, decoder_num_classes=teacher.out_dim).eval()
    load_strictly(student, checkpoint)
    grid = token_grid(args.num_frames, args.input_size, args.input_size)
    samples = []
    for index in indices:
        natural, clip, boxes, mask = draw_sample(dataset, index % len(dataset), seed)
        losses = token_losses(student, teacher, clip, mask)
        patch = args.input_size // grid[1]
        hidden = mask.reshape(grid).repeat(patch, axis=1).repeat(patch, axis=2)[..., None]  # [t, H, W, 1]
        shown = clip[::TUBELET_SIZE]
        rows = [("clip", natural[::TUBELET_SIZE])]
        if boxes is not None:
            rows.append(("overlay", draw_boxes(shown, boxes[:, ::TUBELET_SIZE])))
        rows.append(("mask", np.where(hidden, np.uint8(40), shown)))
        rows.append((f"loss {np.nanmean(losses):.2f}", losses.reshape(grid)))
        samples.append(rows)
    return samples


def draw_boxes(frames: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Frames uint8 ``[t, H, W, 3]`` with the outlines of boxes ``[K, t, 4]``, a copy."""
    frames = frames.copy()
    for track, colour in zip(boxes, cycle(COLOURS)):
        for frame, (x1, y1, x2, y2) in zip(frames, track.tolist()):
            cv2.rectangle(frame, (x1, y1), (x2 - 1, y2 - 1), colour, 1)
    return frames


def paint(blocks: list[tuple[str, list[Row]]], output: str) -> None:
    """Write titled blocks of rows as one picture; losses share a colour scale."""
    losses = np.concatenate([images.ravel() for _, rows in blocks for _, images in rows if images.ndim == 3])
    low, high = np.nanpercentile(losses, (2, 98))
    colours = matplotlib.colormaps["inferno"].with_extremes(bad="0.85")
    heights = [1.1 * len(rows) + 0.4 for _, rows in blocks]
    steps = max(len(images) for _, rows in blocks for _, images in rows)
    figure = plt.figure(figsize=(1.1 * steps + 1.4, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(blocks), height_ratios=heights, squeeze=False)[:, 0]
    for part, (title, rows) in zip(parts, blocks):
        part.suptitle(title, fontsize=10, fontweight="bold")
        axes = part.subplots(len(rows), steps, squeeze=False)
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[], frame_on=False)
        for line, (label, images) in zip(axes, rows):
            line[0].set_ylabel(label)
            for axis, image in zip(line, images):
                drawn = axis.imshow(image, cmap=colours, vmin=low, vmax=high)
        part.colorbar(drawn, ax=axes, shrink=0.8, label="loss of a hidden token")
    figure.savefig(output, dpi=110)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="of run_smile_pretraining.py")
    parser.add_argument("--output", default="picture.png", help="picture to write (default picture.png)")
    parser.add_argument("--samples", type=int, nargs="+", default=[0], help="lines of the list, from 0 (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="of crops, objects and masks")
    for name in MOVABLE:
        parser.add_argument(f"--{name}", help="instead of the checkpoint's")
    return parser.parse_args(argv)


def main(options: argparse.Namespace) -> None:
    """Paint the samples of every checkpoint."""
    setup_logging()
    blocks = []
    for checkpoint in options.checkpoints:
        args = read_checkpoint(checkpoint).get("args")
        if not hasattr(args, "mask_type"):
            raise RunError(f"{checkpoint}: not a checkpoint of run_smile_pretraining.py")
        vars(args).update({name: getattr(options, name) for name in MOVABLE if getattr(options, name) is not None})
        title = "/".join(Path(checkpoint).resolve().parts[-2:])
        for index, rows in zip(options.samples, sample_rows(checkpoint, args, options.samples, options.seed)):
            blocks.append((f"{title}, sample {index}", rows))
    paint(blocks, options.output)
    print(options.output)


if __name__ == "__main__":
    run_main(main, get_args())
