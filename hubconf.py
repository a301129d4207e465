"""SMILE's models for torch.hub: an entry point for each model of modeling_finetune.py and modeling_pretrain.py.

    model = torch.hub.load("/path/to/here", "vit_base_patch16_224", source="local", checkpoint="finetuned.pth")

Number of classes, width of the target and depth of the decoder are taken from the weights. ``model.trained_with`` holds
other options of the training, such as those of the clips.
"""

import collections.abc
import functools
import importlib.util
import pathlib
import sys
import threading
import types

import torch

dependencies = ["einops", "huggingface_hub", "numpy", "safetensors", "timm", "torch"]

# Files of this project that are needed, each after those that it imports.
_FILES = ("utils", "weights", "modeling_finetune", "modeling_pretrain")
_LOCK = vars(torch.hub).setdefault("_smile_lock", threading.RLock())  # each torch.hub.load executes this file anew
_CLIP_OPTIONS = ("num_frames", "sampling_rate", "input_size", "data_set")


def _import_apart() -> list[types.ModuleType]:
    """Import _FILES as ``smile_utils`` etc., since the calling program may have a utils.py too.

    While they load, this folder is not in sys.path: packages that they import may look for a `datasets` of their own.
    """
    here = pathlib.Path(__file__).resolve().parent
    taken = {name: sys.modules.pop(name, None) for name in _FILES}
    left_out = [(place, path) for place, path in enumerate(sys.path) if pathlib.Path(path).resolve() == here]
    for _, path in left_out:
        sys.path.remove(path)
    try:
        for name in _FILES:
            sys.modules[name] = _import_file(f"smile_{name}", str(here / f"{name}.py"))  # for those that import it
        return [sys.modules[name] for name in _FILES]
    finally:
        for place, path in left_out:  # not as it was: another thread may have added to it
            sys.path.insert(place, path)
        for name, module in taken.items():
            sys.modules.pop(name, None)
            if module:
                sys.modules[name] = module


def _import_file(name: str, file: str) -> types.ModuleType:
    """Import a file as module `name`, unless that has been done."""
    if name in sys.modules and sys.modules[name].__file__ == file:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


with _LOCK:
    _, _weights, _modeling_finetune, _modeling_pretrain = _import_apart()


def _entry_point(name: str, build: functools.partial) -> collections.abc.Callable:
    """Return the function that torch.hub calls for a model."""

    def load(path: str, **kwargs) -> torch.nn.Module:
        checkpoint = _weights.read_checkpoint(path, whole=False)
        found = _weights.model_weights(checkpoint, path)
        if name in _modeling_pretrain.MODELS:
            depth = len({key.split(".")[2] for key in found if key.startswith("decoder.blocks.")})
            if depth and "decoder.head.bias" in found:
                kwargs = {"decoder_depth": depth, "decoder_num_classes": len(found["decoder.head.bias"])} | kwargs
            model = build(**kwargs)
            _weights.load_strictly(model, path)
        else:
            classes = len(found.get(_weights.encoder_prefix(found, path) + "head.bias", ()))
            wanted = kwargs.setdefault("num_classes", classes)
            model = build(**kwargs)
            _weights.load_encoder(model, path, need_head=0 < classes == wanted)
        stored = _weights.stored_options(checkpoint)
        model.trained_with = {option: stored[option] for option in _CLIP_OPTIONS if option in stored}
        return model

    def entry_point(checkpoint: str = "", **kwargs) -> torch.nn.Module:
        with _LOCK:  # what torch.load accepts is set for all threads
            return load(_weights.local_path(checkpoint), **kwargs) if checkpoint else build(**kwargs)

    entry_point.__name__ = name
    entry_point.__doc__ = f"""{name}: {build.func.__name__} of modeling_finetune.py or modeling_pretrain.py.

    Args:
        checkpoint: file (.pth, .safetensors), folder of transformers, or hf://owner/repo/file; empty: new weights. A
            classifier takes pretrained ones too; it then has no head, unless `num_classes` asks for a new one.
        kwargs: those of the model's class.
    Returns:
        The model. Of a checkpoint of this project, its attribute `trained_with` holds num_frames, sampling_rate and
        input_size of the clips in training, and the data_set, as run_class_finetuning.py names them.
    Raises:
        RunError (of utils.py): the checkpoint is unreadable or of another model.
    """
    return entry_point


for _name, _build in (_modeling_finetune.MODELS | _modeling_pretrain.MODELS).items():
    globals()[_name] = _entry_point(_name, _build)
