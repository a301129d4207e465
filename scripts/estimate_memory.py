"""Estimate the GPU memory of training from the size of a model, and the largest batch that fits.

    python scripts/estimate_memory.py --model base large huge
    python scripts/estimate_memory.py --model large huge --finetune

Counts weights, gradients, Adam's moments, and the activations saved for the backward pass: inputs of matrix products,
GELU and norms. Assumes attention without a stored matrix (flash or memory-efficient) and CLIP ViT-B/16 as the teacher.
BENCHMARKS.md compares with measured peaks. --reserve leaves room for CUDA, NCCL and fragmentation.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import modeling_finetune
import modeling_pretrain
from modeling_finetune import PATCH_SIZE, SIZES, TUBELET_SIZE, Size, token_grid
from utils import run_main

TEACHER = 86_000_000  # weights of CLIP's ViT-B/16
TARGET, DECODER_DEPTH = 768, 4  # width of its features; blocks
Clip = tuple[int, int, int]  # frames, height, width


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=SIZES, default=["base", "large", "huge"])
    parser.add_argument("--finetune", action="store_true", help="instead of pretraining with two masks per clip")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--num_frames", type=int, default=16)
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--mask_ratio", type=float, default=0.8)
    parser.add_argument("--gpu_memory", type=float, nargs="+", default=[32, 40, 80], help="of the GPUs, GiB")
    parser.add_argument("--reserve", type=float, default=0.1, help="fraction of the memory to leave free")
    return parser.parse_args(argv)


def saved_bytes(tokens: int, width: int, half: bool, use_checkpoint: bool = False) -> int:
    """Bytes that a block saves for the backward pass; with activation checkpointing only its input.

    For each channel: input and output of two norms, query, key and value, the output of attention, and the hidden layer
    (four times as wide) before and after GELU.
    """
    return tokens * width * (2 if half else 4) * (1 if use_checkpoint else 2 + 2 + 3 + 1 + 4 + 4)


def backward_bytes(tokens: int, width: int, half: bool, use_checkpoint: bool) -> int:
    """Bytes that the backward pass of a block adds: gradients, and with checkpointing the recomputed activations."""
    return tokens * width * (4 * 2 + 4 if half else 4 * 4 + 4) + use_checkpoint * saved_bytes(tokens, width, half)


def pretraining_bytes(size: Size, half: bool, use_checkpoint: bool, clip: Clip, mask_ratio: float) -> int:
    """Peak bytes of a masked clip, early in the backward pass; each clip has two masks."""
    t, h, w = token_grid(*clip)
    tokens, hidden, value = t * h * w, t * int(mask_ratio * h * w), 2 if half else 4
    width, visible = size.decoder_embed_dim, tokens - hidden
    kept = size.depth * saved_bytes(visible, size.embed_dim, half, use_checkpoint)
    kept += DECODER_DEPTH * saved_bytes(tokens, width, half, use_checkpoint)
    kept += value * visible * 3 * TUBELET_SIZE * PATCH_SIZE**2  # pixels of the embedding
    kept += 2 * value * (visible * size.embed_dim + hidden * width)  # final norms
    kept += (clip_bytes(clip) + 4 * tokens * TARGET) // 2
    kept += value * hidden * TARGET  # predictions
    # The peak is in the loss (fp32 copy, gradients and targets of hidden tokens) or in a block's backward pass.
    loss = hidden * TARGET * (4 + 4 + 2 + 4 if half else 4 + 4)
    decoder = backward_bytes(tokens, width, half, use_checkpoint)
    return kept + max(loss, decoder, backward_bytes(visible, size.embed_dim, half, use_checkpoint))


def finetuning_bytes(size: Size, half: bool, use_checkpoint: bool, clip: Clip) -> int:
    """Peak bytes of a clip, early in the backward pass."""
    t, h, w = token_grid(*clip)
    kept = size.depth * saved_bytes(t * h * w, size.embed_dim, half, use_checkpoint)
    kept += backward_bytes(t * h * w, size.embed_dim, half, use_checkpoint)
    return kept + (2 if half else 4) * 3 * clip[0] * clip[1] * clip[2] + clip_bytes(clip)


def clip_bytes(clip: Clip) -> int:
    """Bytes of a clip as uint8 and as normalised fp32."""
    return (1 + 4) * 3 * clip[0] * clip[1] * clip[2]


def fixed_bytes(name: str, half: bool, finetune: bool) -> int:
    """Bytes of weights, gradients, two moments, the 16-bit weights of autocast, and in pretraining the teacher."""
    module = modeling_finetune if finetune else modeling_pretrain
    prefix = "vit" if finetune else "pretrain_videomae"
    with torch.device("meta"):
        model = module.MODELS[f"{prefix}_{name}_patch16_224"]()
    weights = sum(parameter.numel() for parameter in model.parameters())
    return weights * (18 if half else 16) + (0 if finetune else TEACHER * (2 if half else 4))


def largest_batch(room: float, each: int) -> int:
    """The largest batch, a power of two, that fits into `room` bytes; 0 if not one clip fits."""
    count = int(room // each)
    return 1 << count.bit_length() - 1 if count > 0 else 0


def main() -> None:
    """Print the table."""
    args = get_args()
    clip, half = (args.num_frames, args.input_size, args.input_size), args.precision != "fp32"
    heads = ["model", "`--use_checkpoint`", "fixed, GiB", "a clip, MiB", *(f"{card:g} GiB" for card in args.gpu_memory)]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for name, use_checkpoint in itertools.product(args.model, (False, True)):
        fixed = fixed_bytes(name, half, args.finetune)
        if args.finetune:
            each = finetuning_bytes(SIZES[name], half, use_checkpoint, clip)
        else:
            each = pretraining_bytes(SIZES[name], half, use_checkpoint, clip, args.mask_ratio)
        batches = [largest_batch((1 - args.reserve) * card * 2**30 - fixed, each) for card in args.gpu_memory]
        cells = (name, "on" if use_checkpoint else "off", f"{fixed / 2**30:.1f}", f"{each / 2**20:.0f}", *batches)
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    run_main(main)
