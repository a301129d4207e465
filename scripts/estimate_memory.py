"""GPU memory that training takes, estimated from the sizes of a model, and the batch that fits a card.

    python scripts/estimate_memory.py --model base large huge
    python scripts/estimate_memory.py --model large huge --finetune

Counts weights, gradients, Adam's moments, and what the backward pass needs of each clip: inputs of products, of GELU
and of norms. Attention is taken to be computed without its matrix (flash or memory-efficient), the teacher to be CLIP's
ViT-B/16. BENCHMARKS.md compares with measured peaks. A part of the card is left to CUDA, NCCL and fragments: --reserve.
"""

import argparse
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
    parser.add_argument("--finetune", action="store_true", help="instead of pretraining with two masks a clip")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--num_frames", type=int, default=16)
    parser.add_argument("--input_size", type=int, default=224)
    parser.add_argument("--mask_ratio", type=float, default=0.8)
    parser.add_argument("--gpu_memory", type=float, nargs="+", default=[32, 40, 80], help="of cards, GiB")
    parser.add_argument("--reserve", type=float, default=0.1, help="part of it that training leaves free")
    return parser.parse_args(argv)


def block_bytes(tokens: int, width: int, half: bool) -> int:
    """What a block keeps of so many tokens for the backward pass.

    Of each channel: the input and output of two norms, query, key and value, attention's output, and the hidden layer,
    four times as wide, before and after GELU. Under autocast norms read fp32, and all the rest is 16 bits.
    """
    return tokens * width * (2 * (4 + 2) + 2 * (3 + 1 + 4 + 4) if half else 4 * (2 + 2 + 3 + 1 + 4 + 4))


def blocks_bytes(tokens: int, width: int, depth: int, half: bool, use_checkpoint: bool) -> int:
    """What `depth` blocks keep; with activation checkpointing only what enters each."""
    if use_checkpoint:
        return depth * tokens * width * (2 if half else 4)
    return depth * block_bytes(tokens, width, half)


def backward_bytes(tokens: int, width: int, half: bool, use_checkpoint: bool) -> int:
    """What going back through a block adds: gradients of hidden layer and residual stream, and the block made again."""
    return tokens * width * (4 * 2 + 4 if half else 4 * 4 + 4) + use_checkpoint * block_bytes(tokens, width, half)


def pretraining_bytes(size: Size, half: bool, use_checkpoint: bool, clip: Clip, mask_ratio: float) -> int:
    """Bytes a masked clip takes at the peak, early in the backward pass; each clip has two masks."""
    t, h, w = token_grid(*clip)
    tokens, hidden, value = t * h * w, t * int(mask_ratio * h * w), 2 if half else 4
    width, visible = size.decoder_embed_dim, tokens - hidden
    kept = blocks_bytes(visible, size.embed_dim, size.depth, half, use_checkpoint)
    kept += blocks_bytes(tokens, width, DECODER_DEPTH, half, use_checkpoint)
    if use_checkpoint:  # the decoder's residual stream is fp32, as its mask token is
        kept += (4 - value) * DECODER_DEPTH * tokens * width
    kept += value * visible * 3 * TUBELET_SIZE * PATCH_SIZE**2  # pixels of the embedding
    kept += (4 + value) * (visible * size.embed_dim + hidden * width)  # final norms
    kept += (clip_bytes(clip) + 4 * tokens * TARGET) // 2
    kept += value * hidden * TARGET  # predictions
    # Beside them, in the loss their fp32 copy, gradients and targets of hidden tokens; or a block's backward pass.
    loss = hidden * TARGET * (4 + 4 + 2 + 4 if half else 4 + 4)
    decoder = backward_bytes(tokens, width, half, use_checkpoint)
    return kept + max(loss, decoder, backward_bytes(visible, size.embed_dim, half, use_checkpoint))


def finetuning_bytes(size: Size, half: bool, use_checkpoint: bool, clip: Clip) -> int:
    """Bytes a clip takes at the peak, early in the backward pass."""
    t, h, w = token_grid(*clip)
    kept = blocks_bytes(t * h * w, size.embed_dim, size.depth, half, use_checkpoint)
    kept += backward_bytes(t * h * w, size.embed_dim, half, use_checkpoint)
    return kept + (2 if half else 4) * 3 * clip[0] * clip[1] * clip[2] + clip_bytes(clip)


def clip_bytes(clip: Clip) -> int:
    """A clip as uint8 and normalised, fp32."""
    return (1 + 4) * 3 * clip[0] * clip[1] * clip[2]


def fixed_bytes(name: str, half: bool, finetune: bool) -> int:
    """Weights, gradients, two moments and the weights that autocast holds in 16 bits; in pretraining the teacher."""
    module = modeling_finetune if finetune else modeling_pretrain
    with torch.device("meta"):
        model = module.MODELS[f"{'' if finetune else 'pretrain_videomae_'}{'vit_' * finetune}{name}_patch16_224"]()
    weights = sum(parameter.numel() for parameter in model.parameters())
    return weights * (18 if half else 16) + (0 if finetune else TEACHER * (2 if half else 4))


def largest_batch(room: float, each: int) -> int:
    """The largest power of two of clips that fits `room` bytes, 0 if not one does: total batches are powers of two."""
    count = int(room // each)
    return 1 << count.bit_length() - 1 if count > 0 else 0


def main() -> None:
    """Print the table."""
    args = get_args()
    clip, half = (args.num_frames, args.input_size, args.input_size), args.precision != "fp32"
    cards = " | ".join(f"{memory:g} GiB" for memory in args.gpu_memory)
    print(
        f"| model | `--use_checkpoint` | fixed, GiB | a clip, MiB | {cards} |\n{'|---' * (4 + len(args.gpu_memory))}|"
    )
    for name, use_checkpoint in ((name, flag) for name in args.model for flag in (False, True)):
        fixed = fixed_bytes(name, half, args.finetune)
        if args.finetune:
            each = finetuning_bytes(SIZES[name], half, use_checkpoint, clip)
        else:
            each = pretraining_bytes(SIZES[name], half, use_checkpoint, clip, args.mask_ratio)
        rooms = [(1 - args.reserve) * card * 2**30 - fixed for card in args.gpu_memory]
        cells = [name, "on" if use_checkpoint else "off", f"{fixed / 2**30:.1f}", f"{each / 2**20:.0f}"]
        print("| " + " | ".join([*cells, *(str(largest_batch(room, each)) for room in rooms)]) + " |")


if __name__ == "__main__":
    run_main(main)
