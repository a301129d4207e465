"""Reading weight files of this project and of others, and loading them into models.

Files are read with weights_only=True, so no code in them is executed. (CLIP files are read by modeling_teacher.py.)
"""

import argparse
import hashlib
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open

from utils import RunError, first_line, logger

Weights = dict[str, torch.Tensor]
MODEL_KEYS = ("model", "module", "state_dict", "model_state")
USUAL_PREFIXES = ("encoder.", "backbone.", "model.", "")  # of an encoder's names
HUB = re.compile(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?/(.+)")
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+|(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
FOLDER_FILES = ("model*.safetensors", "pytorch_model*.bin")  # of transformers

# Names of transformers that differ from ours: of modules, and of the parts of a block.
THEIR_MODULES = {
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer": "blocks",
    "layernorm": "norm",
    "decoder.decoder_layers": "decoder.blocks",
    "classifier": "head",
}
THEIR_PARTS = {
    "layernorm_before": "norm1",
    "attention.attention": "attn",
    "attention.attention.query": "attn.query",
    "attention.attention.key": "attn.key",
    "attention.attention.value": "attn.value",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
BLOCK = re.compile(r"(encoder\.layer|decoder\.decoder_layers)\.(\d+)\.(.+)\.(\w+)")


def local_path(path: str) -> str:
    """Return the local path of a weight file; ``hf://owner/repo[@revision]/file`` is downloaded to the hub's cache.

    HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN apply. Raises RunError if the name is malformed, or the file is
    neither cached nor available for download.
    """
    match = HUB.fullmatch(path)
    if not match:
        if path.startswith("hf:"):
            raise RunError(f"{path}: write hf://owner/repo/path/of/the/file")
        return path
    repo, revision, file = match.groups()
    try:
        return hf_hub_download(repo, file, revision=revision)
    except LocalEntryNotFoundError as error:
        raise RunError(
            f"{path} is not in {constants.HF_HUB_CACHE} and cannot be fetched from here: download "
            f"{hf_hub_url(repo, file, revision=revision)} elsewhere and name that file instead, or put "
            f"models--{repo.replace('/', '--')} of another machine's cache into this one"
        ) from error
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be fetched ({first_line(error)[:160]})") from error


class _NumpyType:
    """Replaces numpy.dtype while a checkpoint is read, so that NumPy's code does not process untrusted values."""

    def __init__(self, code: str, *_: Any):
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


class _NumpyArray:
    """Replaces numpy.ndarray, whose contents are not needed."""

    def __setstate__(self, state: tuple) -> None:
        pass


def _numpy_number(kind: _NumpyType, content: bytes) -> Any:
    """Decode a NumPy scalar."""
    if not re.fullmatch(r"[biufcSU]\d+", kind.code):
        raise ValueError(f"a NumPy value of type {kind.code}")
    return np.frombuffer(content, kind.order.replace("|", "") + kind.code)[0].item()


def _called(name: str, value: Any) -> Any:
    """Give `value` the qualified name that a file uses for it."""
    value.__module__, _, value.__name__ = name.rpartition(".")
    value.__qualname__ = value.__name__
    return value


# What a checkpoint may contain besides tensors and plain values. NumPy 2 renamed core to _core.
ALLOWED = [argparse.Namespace, _called("numpy.dtype", _NumpyType), _called("numpy.ndarray", _NumpyArray)]
for _core in ("numpy.core", "numpy._core"):
    ALLOWED.append(_called(f"{_core}.multiarray.scalar", lambda kind, content: _numpy_number(kind, content)))
    ALLOWED.append(_called(f"{_core}.multiarray._reconstruct", lambda *_: _NumpyArray()))


def weight_files(folder: Path) -> list[Path]:
    """Find the files of a folder of transformers that hold its weights; [] if there are none."""
    return next(filter(None, (sorted(folder.glob(names)) for names in FOLDER_FILES)), [])


def read_checkpoint(path: str | Path, whole: bool = True) -> dict[str, Any]:
    """Read a .pth or .safetensors file, or a folder of transformers, to the CPU without executing code in it.

    Released files have an ``argparse.Namespace`` under ``args``; apart from it only tensors, plain values and NumPy
    scalars are allowed.

    Args:
        whole: if False, checksums are not verified, and tensors stay on disk; for names and options alone.
    Raises:
        RunError: no such file, damaged, or with contents that are not allowed.
    """
    path = Path(path)
    if path.is_dir():
        parts = weight_files(path)
        if not parts:
            raise RunError(f"{path}: a folder without {' or '.join(FOLDER_FILES)}; name a checkpoint file in it")
        read = [read_checkpoint(part, whole) for part in parts]
        return {"model": {name: value for part in read for name, value in part.get("model", part).items()}}
    if not path.is_file():
        raise RunError(f"{path}: no such checkpoint file")
    start = b""
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        if start[8:9] == b"{":  # of safetensors, whatever its name: the length of a header in JSON, then the header
            return _read_safetensors(path)
        zipped = zipfile.is_zipfile(path)
        if zipped and whole:
            with zipfile.ZipFile(path) as archive:  # torch.load does not verify checksums
                damaged = archive.testzip()
            if damaged:
                raise RunError(f"{path}: damaged checkpoint (checksum of {damaged})")
        with torch.serialization.safe_globals(ALLOWED):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped and not whole)
    except RunError:
        raise
    except Exception as error:  # zip, pickle, torch and safetensors each fail in their own ways
        raise RunError(_unreadable(path, start, error)) from error
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise RunError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Read a safetensors file, and the options in its metadata if scripts/convert_checkpoint.py wrote it."""
    with safe_open(path, "pt") as file:
        weights, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    args = json.loads(metadata.get("smile_args", "{}"))
    return {"model": weights} | ({"args": argparse.Namespace(**args)} if args else {})


def _unreadable(path: Path, start: bytes, error: Exception) -> str:
    """Error message for a file that begins with `start` and could not be read, with the remedy."""
    if start.startswith(b"version https://git-lfs"):
        return f"{path}: a pointer of Git LFS, not the checkpoint itself: fetch that with `git lfs pull`"
    if start.lstrip().startswith(b"<"):
        return f"{path}: a web page, not a checkpoint: the download asked for a login or a confirmation"
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        return f"{path}: not a readable checkpoint: the file ends too early, so copy or download it again"
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error) or type(error).__name__)
    forbidden = re.search(r"(?:GLOBAL|class|type) ([\w.]+) (?:was not an allowed|whose module)", text)
    if not forbidden:
        said = text.rpartition("WeightsUnpickler error: ")[2].strip().splitlines()[0].split(". In PyTorch")[0]
        return f"{path}: not a readable checkpoint ({said[:120]})"
    return (
        f"{path}: not a readable checkpoint: it holds a {forbidden[1]}, which can execute code and "
        "is not loaded. If you trust its source, extract the weights where its program is installed: "
        'python -c "import torch; '
        f"c = torch.load('{path}', weights_only=False, map_location='cpu'); "
        "torch.save({'model': c['model']}, 'weights.pth')\", with its own key for 'model' (print(c.keys())), or "
        "c.state_dict() for c['model'] if it holds a model"
    )


def stored_options(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the run that wrote a checkpoint; empty if another program wrote it, with other options."""
    args = checkpoint.get("args")
    known = vars(args) if isinstance(args, argparse.Namespace) else {}
    return known if "max_bad_fraction" in known else {}


def model_weights(checkpoint: dict[str, Any], path: str | Path = "checkpoint", key: str = "") -> Weights:
    """Return the state dict in a checkpoint, with the names of the models here.

    Prefixes of DDP, FSDP, torch.compile and of other wrappers are removed, and names of transformers' VideoMAE are
    translated.

    Args:
        key: its key in the checkpoint, or several keys separated by ``|``. If empty, the usual keys; for a run with
            --model_ema, the averaged weights, which are the ones it tested.
    Raises:
        RunError: no state dict under these keys.
    """
    usual = ("model_ema",) if stored_options(checkpoint).get("model_ema") else MODEL_KEYS
    keys = tuple(key.split("|")) if key else usual
    state = next((checkpoint[key] for key in keys if isinstance(checkpoint.get(key), dict)), {} if key else checkpoint)
    named = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
    if not named:
        others = [str(name) for name, value in checkpoint.items() if isinstance(value, dict) and name not in keys]
        remedy = f"; --model_key names another place, there are {_names(others)}" if others else ""
        raise RunError(f"{path}: no weights in it (looked under {', '.join(keys)}){remedy}")
    return from_transformers({WRAPPERS.sub("", name): value for name, value in named.items()})


def our_name(theirs: str) -> str:
    """Translate a name of transformers; query, key and value stay separate."""
    block = BLOCK.fullmatch(theirs)
    if block:
        stack, number, part, leaf = block.groups()
        return f"{THEIR_MODULES[stack]}.{number}.{THEIR_PARTS.get(part, part)}.{leaf}"
    module, dot, leaf = theirs.rpartition(".")
    return THEIR_MODULES.get(module, module) + dot + leaf


def from_transformers(theirs: Weights) -> Weights:
    """Translate weights of transformers' VideoMAE; return other weights unchanged.

    A classification model becomes a classifier; other models become a pretraining model, with the prefix ``encoder.``.
    """
    bare = {name.removeprefix("videomae."): value for name, value in theirs.items()}
    if "embeddings.patch_embeddings.projection.weight" not in bare:
        return theirs
    encoder, parts = "" if "classifier.weight" in bare else "encoder.", ("query", "key", "value")
    ours = {our_name(name): value for name, value in bare.items()}
    for name in [name for name in ours if name.endswith(".attn.query.weight")]:
        three = [name.replace(".query.", f".{part}.") for part in parts]
        if ours.keys() >= set(three):
            ours[name.replace(".query.", ".qkv.")] = torch.cat([ours.pop(part) for part in three])
    inside = ("patch_embed.", "blocks.", "norm.")
    return {encoder * name.startswith(inside) + name: value for name, value in ours.items()}


def fingerprint(path: str | Path) -> str:
    """Return a hash of a checkpoint file, or of those in a folder of transformers."""
    found, path = hashlib.sha256(), Path(path)
    for file in weight_files(path) if path.is_dir() else [path]:
        with open(file, "rb") as opened:
            hashlib.file_digest(opened, lambda: found)
    return f"sha256:{found.hexdigest()[:16]}"


def check_kind(path: str, name: str, kind: str, key: str = "") -> None:
    """Raise RunError if a checkpoint is unreadable or has no weights called `name`, before anything is built."""
    if not any(name in own for own in model_weights(read_checkpoint(path, whole=False), path, key)):
        raise RunError(f"{path} is not a {kind} checkpoint: it has no {name}")


def load_strictly(model: torch.nn.Module, path: str | Path, key: str = "") -> None:
    """Load the weights of a checkpoint (those under `key`) into a model.

    Raises RunError: any name or shape differs, or a weight is not finite.
    """
    weights, own = model_weights(read_checkpoint(path), path, key), model.state_dict()
    wrong = list(_misshapen(weights, own).values())
    wrong += [f"{name} is missing in the checkpoint" for name in own if name not in weights]
    wrong += [f"{name} is not in the model" for name in weights if name not in own]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        remedy = "check --model and the options that set its sizes"
        raise RunError(f"{path} does not fit this model: {wrong[0]}{more}; {remedy}")
    _check_finite(weights, path)
    model.load_state_dict(weights)
    logger.info("loaded %d tensors from %s", len(weights), path)


def encoder_prefix(weights: Weights, path: str | Path = "checkpoint", prefix: str = "") -> str:
    """Prefix of the encoder's names in a file, such as ``encoder.`` of a pretraining model or Lightning's ``model.``.

    Args:
        prefix: what it begins with; needed if there are several encoders, none of them with a usual prefix.
    Raises:
        RunError: there are several.
    """
    first = "patch_embed.proj.weight"
    found = [name.removesuffix(first) for name in weights if name.startswith(prefix) and name.endswith(first)]
    if usual := [prefix + name for name in USUAL_PREFIXES if prefix + name in found]:
        return usual[0]
    if len(found) > 1:
        raise RunError(f"{path} holds several encoders, {_names(found)}: select one with --model_prefix")
    return found[0] if found else prefix


def load_encoder(
    model: torch.nn.Module, path: str | Path, need_head: bool = False, key: str = "", prefix: str = ""
) -> None:
    """Load the matching weights of a pretraining or fine-tuned checkpoint into a classifier, and log which.

    From a pretraining checkpoint the encoder is loaded (see encoder_prefix). A head with another number of classes is
    skipped.

    Args:
        need_head: head and final norm must be in the checkpoint, since the model is used without training.
        key: see model_weights.
        prefix: see encoder_prefix.
    Raises:
        RunError: unreadable, of another size, without an encoder, or a weight is not finite.
    """
    everything, own = model_weights(read_checkpoint(path), path, key), model.state_dict()
    prefix = encoder_prefix(everything, path, prefix)
    weights = {name.removeprefix(prefix): value for name, value in everything.items() if name.startswith(prefix)}
    other = _misshapen(weights, own)
    fitting = {name: weights[name] for name in own if name in weights and name not in other}
    wrong = [text for name, text in other.items() if not name.startswith("head.")]
    if not any(name.startswith("blocks.") for name in weights):
        wrong = ["none of its parameters has a name of this model"]
    body = ("patch_embed.", "blocks.")
    wrong += [f"{name} is missing in the checkpoint" for name in own if name.startswith(body) and name not in weights]
    wrong += [f"{name} is not in the model" for name in weights if name.startswith(body) and name not in own]
    if wrong:
        raise RunError(f"{path} does not fit this model: {wrong[0]}; check --model")
    new = [name for name in own if name not in fitting]
    left = [name for name in everything if name.removeprefix(prefix) not in fitting]
    if need_head and new:
        raise RunError(f"{path} lacks {', '.join(new[:4])}; it is not fine-tuned for this number of classes")
    _check_finite(fitting, path)
    model.load_state_dict(fitting, strict=False)
    logger.info(
        "%s: loaded %d tensors; newly initialised: %s; unused: %s", path, len(fitting), _names(new), _names(left)
    )


def _misshapen(weights: Weights, own: Weights) -> dict[str, str]:
    """Map the name of each weight whose shape differs from the model's own to a message."""
    pairs = {name: (list(weights[name].shape), list(own[name].shape)) for name in own if name in weights}
    return {
        name: f"{name} is {there} in the checkpoint, {here} in the model"
        for name, (there, here) in pairs.items()
        if there != here
    }


def _check_finite(weights: Weights, path: str | Path) -> None:
    """Raise RunError if a weight is NaN or infinite."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise RunError(f"{path}: {name} has values that are NaN or infinite; use an earlier checkpoint of that run")


def _names(names: list[str]) -> str:
    """Join the first names of a list, and the number of others."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "none"
