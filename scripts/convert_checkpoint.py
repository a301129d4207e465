"""Convert weights to Hugging Face's transformers (VideoMAE) and back, and between .pth and .safetensors.

    python scripts/convert_checkpoint.py finetuned.pth videomae_folder --classes classes.txt
    python scripts/convert_checkpoint.py videomae_folder finetuned.pth
    python scripts/convert_checkpoint.py finetuned.pth finetuned.safetensors

If the destination ends in .pth, .pt or .safetensors, it is a file of this project, otherwise a folder for
``from_pretrained``. The result is read again and run on a random clip; it is deleted if its output differs from that of
the source. A fine-tuned model becomes VideoMAEForVideoClassification, a model pretrained on pixels
VideoMAEForPreTraining. That class does not support other targets: the encoder of a model pretrained on them becomes a
VideoMAEModel, and its decoder is saved in a separate file, so that it can be converted back.
"""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers import (
    AutoConfig,
    PreTrainedModel,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    VideoMAEModel,
)
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoints import save_checkpoint
from lists import read_text
from modeling_finetune import PATCH_SIZE, SIZES, TUBELET_SIZE, Size, VisionTransformer, token_grid
from modeling_pretrain import Encoder, PretrainVisionTransformer, split_tokens
from options import CLIP_OPTIONS
from utils import RunError, logger, run_main, setup_logging, user_errors
from weights import THEIR_MODULES, THEIR_PARTS, Weights, local_path, model_weights, read_checkpoint, stored_options

FILES = (".pth", ".pt", ".safetensors")
DECODER = "smile_decoder.safetensors"  # next to a VideoMAEModel, with our names
IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
KINDS = {kind.__name__: kind for kind in (VideoMAEForVideoClassification, VideoMAEForPreTraining, VideoMAEModel)}
PIXELS = 3 * TUBELET_SIZE * PATCH_SIZE**2
# Options of a run that its weights are used with, and the one by which weights.stored_options knows this project's.
KEPT = (*CLIP_OPTIONS, "model", "data_set", "nb_classes", "several_labels", "max_bad_fraction")
MODULES = {ours: theirs for theirs, ours in THEIR_MODULES.items()}
PARTS = {ours: theirs for theirs, ours in THEIR_PARTS.items()}  # of a block


def their_names(name: str, encoder_prefix: str) -> list[str]:
    """Names in transformers of one of our tensors: one, or three (query, key, value) that divide its first axis."""
    name = name.removeprefix("encoder.")
    module, dot, leaf = name.rpartition(".")
    theirs = f"{MODULES.get(module, module)}{dot}{leaf}"
    if block := re.fullmatch(r"(.+)\.(\d+)\.(.+)\.(\w+)", name):
        stack, number, part, leaf = block.groups()
        theirs = f"{MODULES[stack]}.{number}.{PARTS.get(part, 'attention.attention.{}')}.{leaf}"
    prefix = encoder_prefix * theirs.startswith(("embeddings.", "encoder.", "layernorm."))
    parts = ("query", "key", "value") if "{}" in theirs else ("",)
    return [prefix + theirs.format(part) for part in parts]


def count(weights: Weights, prefix: str) -> int:
    """Number of blocks whose names begin with `prefix`."""
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


def size_of(weights: Weights) -> Size:
    """Size of the model with these weights. Raises RunError if there is none."""
    prefix = "" if "head.bias" in weights else "encoder."
    width, depth = len(weights.get(f"{prefix}patch_embed.proj.bias", ())), count(weights, f"{prefix}blocks.")
    for size in SIZES.values():
        if (size.embed_dim, size.depth) == (width, depth):
            return size
    raise RunError(f"no model of this project has {depth} blocks of width {width}")


def build_ours(weights: Weights, path: Path) -> nn.Module:
    """Build the classifier, pretraining model, or encoder that has these weights. Raises RunError if there is none."""
    size = size_of(weights)
    if "head.bias" in weights:
        model: nn.Module = VisionTransformer(size, num_classes=len(weights["head.bias"]))
    elif "decoder.head.bias" in weights:
        model = PretrainVisionTransformer(size, count(weights, "decoder.blocks."), len(weights["decoder.head.bias"]))
    else:
        model = nn.ModuleDict({"encoder": Encoder(size, 0.0, False)})
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # its second line names the first tensors
        raise RunError(f"{path}: {str(error).splitlines()[1].strip()[:160]}") from error
    return model


def load_theirs(folder: Path) -> PreTrainedModel:
    """Load a model of transformers from its folder. Raises RunError if it is not VideoMAE, or incomplete."""
    if not (folder / "config.json").is_file():
        raise RunError(f"{folder}: no config.json in it, so no Hugging Face model")
    kind = (AutoConfig.from_pretrained(folder).architectures or ["model of no name"])[0]
    if kind not in KINDS:
        raise RunError(f"{folder}: holds a {kind}, none of {', '.join(KINDS)}")
    model, report = KINDS[kind].from_pretrained(folder, output_loading_info=True)
    if report["missing_keys"]:
        raise RunError(f"{folder}: lacks {', '.join(sorted(report['missing_keys'])[:3])}")
    return model


def load(path: Path) -> tuple[nn.Module, Weights, dict[str, Any]]:
    """Load a file of this project, or a folder of transformers: the model, its weights with our names, the checkpoint.

    Raises RunError if it cannot be read, or is not a model of this project.
    """
    theirs = load_theirs(path) if path.is_dir() else None
    checkpoint = read_checkpoint(path)
    weights = model_weights(checkpoint, path)
    if isinstance(theirs, VideoMAEModel) and (path / DECODER).is_file():
        weights |= load_file(path / DECODER)
    ours = build_ours(weights, path)
    return theirs or ours, ours.state_dict(), checkpoint


def read_config(model: PreTrainedModel, folder: Path) -> tuple[int, int, list[str]]:
    """Frames, side, and class names (empty if they are placeholders) of a model of transformers.

    Warns if it was trained with another normalisation than ours.
    """
    config, side = model.config, model.config.image_size
    names = [config.id2label[label] for label in range(config.num_labels)]
    if (folder / "preprocessor_config.json").is_file():
        processor = VideoMAEImageProcessor.from_pretrained(folder)
        if (tuple(processor.image_mean), tuple(processor.image_std)) != IMAGENET:
            logger.warning("%s was trained with another normalisation than ImageNet's, which is ours", folder)
    placeholders = [f"LABEL_{label}" for label in range(len(names))]
    return config.num_frames, side if isinstance(side, int) else side[0], [] if names == placeholders else names


def write_ours(weights: Weights, path: Path, options: dict[str, Any]) -> None:
    """Write weights as a checkpoint, with the options of KEPT from those of the run."""
    kept = {name: options[name] for name in KEPT if name in options}
    if path.suffix == ".safetensors":
        metadata = {"format": "pt"} | ({"smile_args": json.dumps(kept)} if kept else {})
        save_file({name: value.contiguous() for name, value in weights.items()}, path, metadata)
    else:
        save_checkpoint({"model": weights} | ({"args": argparse.Namespace(**kept)} if kept else {}), path)


def write_theirs(weights: Weights, folder: Path, frames: int, side: int, classes: list[str]) -> None:
    """Write our weights as a folder of transformers: config with class names, weights, image processor.

    Raises RunError if the number of classes differs from that of the head.
    """
    size, labels, beside = size_of(weights), len(weights.get("head.bias", ())), Weights()
    if classes and len(classes) != labels:
        raise RunError(f"--classes names {len(classes)} classes, the head has {labels}")
    kind = "VideoMAEForVideoClassification" if labels else "VideoMAEForPreTraining"
    if not labels and len(weights.get("decoder.head.bias", ())) != PIXELS:
        kind, beside = "VideoMAEModel", {n: value for n, value in weights.items() if not n.startswith("encoder.")}
    theirs = {}
    for ours in [name for name in weights if name not in beside]:
        names = their_names(ours, "" if kind == "VideoMAEModel" else "videomae.")
        theirs |= {name: part.clone() for name, part in zip(names, weights[ours].chunk(len(names)))}  # no views
    labelled = dict(enumerate(classes or [f"LABEL_{label}" for label in range(labels)]))
    VideoMAEConfig(
        image_size=side,
        num_frames=frames,
        patch_size=PATCH_SIZE,
        tubelet_size=TUBELET_SIZE,
        hidden_size=size.embed_dim,
        num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads,
        intermediate_size=4 * size.embed_dim,
        decoder_hidden_size=size.decoder_embed_dim,
        decoder_num_hidden_layers=count(weights, "decoder.blocks."),
        decoder_num_attention_heads=size.decoder_num_heads,
        decoder_intermediate_size=4 * size.decoder_embed_dim,
        layer_norm_eps=1e-6,
        use_mean_pooling=labels > 0,
        architectures=[kind],
        id2label=labelled,
        label2id={name: label for label, name in labelled.items()},
    ).save_pretrained(folder)
    save_file(theirs, folder / "model.safetensors", {"format": "pt"})
    if beside:
        save_file(beside, folder / DECODER, {"format": "pt"})
    mean, std = map(list, IMAGENET)
    crop = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    VideoMAEImageProcessor(**crop, image_mean=mean, image_std=std).save_pretrained(folder)


@torch.inference_mode()
def run_model(model: nn.Module, clip: torch.Tensor, mask: torch.Tensor, whole: bool) -> torch.Tensor:
    """Run a model of this project or of transformers on a clip ``[1, 3, T, H, W]``.

    Args:
        mask: bool ``[1, N]``, for models of pretraining, of which only the encoder is run unless `whole`.
    Returns:
        logits ``[1, C]``, predictions ``[1, N_masked, out_dim]``, or encoded visible tokens ``[1, N_visible, D]``.
    """
    model = model.eval().to(clip.dtype)
    if isinstance(model, PreTrainedModel):
        masks = () if isinstance(model, VideoMAEForVideoClassification) else (mask,)
        output = model(clip.transpose(1, 2), *masks)
        return output.last_hidden_state if isinstance(model, VideoMAEModel) else output.logits
    if isinstance(model, VisionTransformer):
        return model(clip)
    if whole and isinstance(model, PretrainVisionTransformer):
        return model(clip, mask)
    return model.encoder(clip, split_tokens(mask)[0])


def difference(first: nn.Module, second: nn.Module, frames: int, side: int) -> float:
    """Largest difference between the outputs of two models for a random clip, in float64 to exclude rounding."""
    tokens, rng = math.prod(token_grid(frames, side, side)), torch.Generator().manual_seed(0)
    clip = torch.randn(1, 3, frames, side, side, generator=rng, dtype=torch.float64)
    mask = torch.randperm(tokens, generator=rng)[None] < tokens // 2
    whole = not any(isinstance(model, VideoMAEModel) for model in (first, second))
    outputs = [run_model(model, clip, mask, whole) for model in (first, second)]
    return (outputs[0] - outputs[1]).abs().max().item()


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="file of this project (also hf://owner/repo/file), or folder of transformers")
    parser.add_argument("destination", help="file (.pth, .pt, .safetensors) or folder to write")
    parser.add_argument("--classes", help="classes.txt, the name of a class a line, for the config of transformers")
    parser.add_argument("--num_frames", type=int, default=0, help="of a clip, if the checkpoint does not say (16)")
    parser.add_argument("--input_size", type=int, default=0, help="side, pixels, if the checkpoint does not say (224)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of outputs (default 1e-4)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    """Convert, compare outputs, and only then move the result to its destination."""
    setup_logging()
    set_verbosity_error()
    disable_progress_bar()
    source, destination = Path(local_path(args.source)), Path(args.destination)
    if destination.exists():
        raise RunError(f"{destination} is already there; remove it or choose another name")
    with user_errors():
        classes = read_text(args.classes).splitlines() if args.classes else []
        destination.parent.mkdir(parents=True, exist_ok=True)

    if source.is_dir() and destination.suffix not in FILES:
        raise RunError(f"{destination}: from a folder to a file, so end it in {', '.join(FILES)}")
    model, weights, checkpoint = load(source)
    if isinstance(model, PreTrainedModel):
        if classes:
            raise RunError("--classes: a folder of transformers has its own names of classes")
        frames, side, classes = read_config(model, source)
    else:
        if classes and destination.suffix in FILES:
            raise RunError("--classes: only a folder of transformers holds the names of classes; omit it")
        trained = checkpoint.get("args")
        frames, side = getattr(trained, "num_frames", 16), getattr(trained, "input_size", 224)
    frames, side = args.num_frames or frames, args.input_size or side
    options = stored_options(checkpoint)
    if source.is_dir():  # max_bad_fraction marks the options of this project
        options = {"num_frames": frames, "input_size": side, "max_bad_fraction": 0.05}
    with user_errors("--"):
        token_grid(frames, side, side)

    with user_errors(), TemporaryDirectory(dir=destination.parent) as folder:
        draft = Path(folder) / destination.name
        if draft.suffix in FILES:
            write_ours(weights, draft, options)
        else:
            write_theirs(weights, draft, frames, side, classes)
        gap = difference(model, load(draft)[0], frames, side)
        if not gap <= args.tolerance:
            raise RunError(
                f"{destination} was not written: its output differs from that of {args.source} by {gap:.2g}, more than "
                f"--tolerance {args.tolerance:g}"
            )
        os.replace(draft, destination)
    logger.info("%s: outputs differ by %.2g on a clip of %d frames, %d px", destination, gap, frames, side)
    if source.is_dir() and classes:
        names = destination.with_suffix(".classes.txt")
        names.write_text("".join(f"{name}\n" for name in classes))
        logger.info("%s: the names of its %d classes", names, len(classes))


if __name__ == "__main__":
    run_main(main, get_args())
