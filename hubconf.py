"""SMILE's models for torch.hub: an entry point for each model of modeling_finetune.py and modeling_pretrain.py.

    model = torch.hub.load("/path/to/here", "vit_base_patch16_224", source="local", checkpoint="finetuned.pth")

What the weights show (number of classes, width of the target, depth of the decoder) need not be said.
"""

import collections.abc
import functools

import torch

import checkpoints
import modeling_finetune
import modeling_pretrain

dependencies = ["einops", "huggingface_hub", "numpy", "safetensors", "tensorboardX", "timm", "torch"]


def _entry_point(name: str, build: functools.partial) -> collections.abc.Callable:
    """What torch.hub calls for a model."""

    def entry_point(checkpoint: str = "", **kwargs) -> torch.nn.Module:
        if not checkpoint:
            return build(**kwargs)
        path = checkpoints.local_path(checkpoint)
        weights = checkpoints.model_weights(checkpoints.read_checkpoint(path), path)
        if name in modeling_pretrain.MODELS:
            depth = len({key.split(".")[2] for key in weights if key.startswith("decoder.blocks.")})
            if depth and "decoder.head.bias" in weights:
                kwargs = {"decoder_depth": depth, "decoder_num_classes": len(weights["decoder.head.bias"])} | kwargs
            model = build(**kwargs)
            checkpoints.load_strictly(model, path)
            return model
        classes = len(weights.get("head.bias", ()))
        wanted = kwargs.setdefault("num_classes", classes)
        model = build(**kwargs)
        checkpoints.load_encoder(model, path, need_head=0 < classes == wanted)
        return model

    entry_point.__name__ = name
    entry_point.__doc__ = f"""{name}: {build.func.__name__} of modeling_finetune.py or modeling_pretrain.py.

    Args:
        checkpoint: file (.pth, .safetensors) or hf://owner/repo/file; empty: new weights. A classifier takes pretrained
            ones too; it then has no head, unless `num_classes` asks for a new one.
        kwargs: those of the model's class.
    Raises:
        utils.RunError: the checkpoint is unreadable or of another model.
    """
    return entry_point


for _name, _build in (modeling_finetune.MODELS | modeling_pretrain.MODELS).items():
    globals()[_name] = _entry_point(_name, _build)
