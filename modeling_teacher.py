"""Teachers: the targets that the student predicts for the tokens of a clip.

`clip`, `dino_v1` and `timm` (any backbone) are features of a frozen image encoder, of the first frame of each tubelet;
`pixel` is VideoMAE's target. Each maps an ImageNet-normalised clip ``[B, 3, T, H, W]`` to normalised targets
``[B, N, D]`` on the student's token grid.
"""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from open_clip.factory import load_state_dict
from open_clip.model import resize_pos_embed
from timm.layers import to_2tuple

from modeling_finetune import NORMS, PATCH_SIZE, TUBELET_SIZE, channel_stats
from utils import first_line, last_line

TARGET_TYPES = ("clip", "dino_v1", "timm", "pixel")
DINO_MODELS = {"dino_s": "vit_small_patch16_224.dino", "dino_b": "vit_base_patch16_224.dino"}
TEACHER_NORMS = (*NORMS, "own")
EPS = 1e-6

Norm = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of RGB in [0, 1]


def normalize_features(features: torch.Tensor) -> torch.Tensor:
    """Normalise ``[B, N, D]`` to zero mean and unit (unbiased) std over the tokens of a clip, per channel."""
    features = features.float()
    std, mean = torch.std_mean(features, dim=1, keepdim=True)
    return (features - mean) / (std + EPS)


class PixelTarget(nn.Module):
    """VideoMAE's target: the pixels of each tubelet, normalised per tubelet and colour.

    Layout of a target of 2·16·16·3 numbers: frame, row, column, colour (p0 p1 p2 c).
    """

    out_dim = TUBELET_SIZE * PATCH_SIZE**2 * 3

    def __init__(self):
        super().__init__()
        self.mean, self.std = (nn.Buffer(values, persistent=False) for values in channel_stats("imagenet"))

    def compile(self, **options) -> None:
        """Do nothing: there is no network."""

    @torch.inference_mode()
    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """ImageNet-normalised ``[B, 3, T, H, W]`` → ``[B, N, out_dim]``, fp32."""
        pixels = clips.float() * self.std + self.mean  # [0, 1]
        sides = {"p0": TUBELET_SIZE, "p1": PATCH_SIZE, "p2": PATCH_SIZE}
        cubes = rearrange(pixels, "b c (t p0) (h p1) (w p2) -> b (t h w) (p0 p1 p2) c", **sides)
        return rearrange(normalize_features(cubes.flatten(0, 1)), "(b n) p c -> b n (p c)", b=len(clips))


class FusedAttention(nn.Module):
    """nn.MultiheadAttention, computed by scaled_dot_product_attention.

    Without torch.compile the original is as fast; compiled, it copies its weights for each token.
    """

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        self.num_heads, self.out_proj = attention.num_heads, attention.out_proj
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias

    def forward(self, x: torch.Tensor, *_: Any, attn_mask: torch.Tensor | None = None, **__: Any) -> tuple[Any, None]:
        """Self-attention ``[B, N, D]`` → ``[B, N, D]``, without weights; has the signature of the original."""
        B, N, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, D / heads]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out_proj(x.transpose(1, 2).reshape(B, N, D)), None


class FrameTower(nn.Module):
    """A frozen image encoder with the size and normalisation of its input.

    Args:
        tower: image encoder of open_clip or timm.
        image_size: (height, width) of its input, pixels; frames of another size are resized.
        norm: mean and std of its input; clips are ImageNet-normalised.
    """

    def __init__(self, tower: nn.Module, image_size: tuple[int, int], norm: Norm):
        super().__init__()
        # Convolutions are up to twice as fast in channels_last; other layers do not care.
        self.tower: Any = tower.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.image_size = image_size
        (mean, std), (to_mean, to_std) = channel_stats("imagenet"), (torch.tensor(v).view(3, 1, 1, 1) for v in norm)
        self.scale = nn.Buffer((std / to_std)[..., 0], persistent=False)  # [3, 1, 1], of a frame
        self.shift = nn.Buffer(((mean - to_mean) / to_std)[..., 0], persistent=False)

    def train(self, mode: bool = True) -> "FrameTower":
        """Stay in eval mode."""
        return super().train(False)

    def frames(self, clips: torch.Tensor) -> torch.Tensor:
        """ImageNet-normalised ``[B, 3, T, H, W]`` → input of the encoder ``[B·T, 3, h, w]``, fp32."""
        frames = rearrange(clips, "b c t h w -> (b t) c h w").float() * self.scale + self.shift
        if frames.shape[-2:] == self.image_size:
            return frames
        return F.interpolate(frames, size=self.image_size, mode="bilinear", antialias=True)


class FrameTeacher(FrameTower):
    """Applies a frozen image encoder to the first frame of each tubelet, in the precision of its weights.

    Args:
        tower, image_size, norm: see FrameTower.
        grid: (h, w) of the student; features on another grid are resized bilinearly.
        stage: index in timm's list of intermediate features; -1 is the last.
    """

    def __init__(
        self, tower: nn.Module, image_size: tuple[int, int], norm: Norm, grid: tuple[int, int], stage: int = -1
    ):
        super().__init__(getattr(tower, "trunk", tower), image_size, norm)  # open_clip wraps timm's towers
        self.grid, self.stage = grid, stage
        with torch.inference_mode():
            maps = self.feature_maps(torch.zeros(1, 3, *image_size))
        if maps.ndim != 4 or maps.shape[2] * maps.shape[3] < 2:  # equal tokens would be normalised to nothing
            raise ValueError(f"features {list(maps.shape[1:])} of frames of {image_size} pixels are not a spatial map")
        self.out_dim = maps.shape[1]

    def compile(self, **options) -> None:
        """Compile the network, inside of inference mode, which torch.compile cannot trace."""
        self.feature_maps = torch.compile(self.feature_maps, **options)  # type: ignore[method-assign]

    def feature_maps(self, frames: torch.Tensor) -> torch.Tensor:
        """Features of the stage, ``[B, 3, H, W]`` → ``[B, D, h, w]``; those of a transformer after its final norm.

        Without class token, registers and projection; later stages are not computed.
        """
        wanted: dict[str, Any] = {"indices": [self.stage], "stop_early": True, "intermediates_only": True}
        if isinstance(self.tower, open_clip.transformer.VisionTransformer):
            found = self.tower.forward_intermediates(frames, normalize_intermediates=True, **wanted)
            return found["image_intermediates"][0]
        norm = not isinstance(self.tower, timm.models.Hiera)  # has none, and raises if asked for it
        return self.tower.forward_intermediates(frames, norm=norm, **wanted)[0]

    @torch.inference_mode()
    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """ImageNet-normalised ``[B, 3, T, H, W]`` → normalised targets ``[B, t·h·w, D]``, fp32."""
        return normalize_features(self.tokens(clips))

    def tokens(self, clips: torch.Tensor) -> torch.Tensor:
        """Features before normalisation, ``[B, 3, T, H, W]`` → ``[B, t·h·w, D]``, time first, fp32."""
        frames = self.frames(clips[:, :, ::TUBELET_SIZE])
        dtype = next(self.tower.parameters()).dtype
        with torch.autocast(frames.device.type, enabled=False):  # it would cast frozen weights again in every step
            maps = self.feature_maps(frames.to(dtype, memory_format=torch.channels_last)).float()
        if maps.shape[-2:] != self.grid:
            maps = F.interpolate(maps, size=self.grid, mode="bilinear", align_corners=False)
        return rearrange(maps, "(b t) d h w -> b (t h w) d", b=len(clips))


class ImageModel(NamedTuple):
    """An image encoder, the (height, width) of its input in pixels, and the statistics it was trained with."""

    tower: Any
    image_size: tuple[int, int]
    norm: Norm


@contextmanager
def creating(weights: str) -> Iterator[None]:
    """Seed the creation of a model, and turn its errors into a ValueError that names the weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # `random` is the same model in every process and after a resume
        try:
            yield
        except Exception as error:  # whatever the network or a wrong file gives
            raise ValueError(
                f"weights {weights}: could not be fetched or loaded ({first_line(error)}); "
                "download the weights elsewhere and give the file's path"
            ) from error


# open_clip ------------------------------------------------------------------------------------------------------


def read_clip_weights(path: str) -> tuple[dict[str, torch.Tensor], bool]:
    """Read the weights of CLIP's image tower from a local file.

    Takes OpenAI's TorchScript archive, a state dict of the whole model (``visual.`` keys, also under ``state_dict`` and
    ``module.``), of the image tower alone, or safetensors of either. TorchScript is a program: torch.jit.load runs code
    of such an archive, so it must come from someone you trust. Nothing in the other files is run.

    Returns:
        The state dict, fp32, with ``visual.`` keys, and whether it is OpenAI's (its activation is QuickGELU).
    Raises:
        ValueError: not a file, unreadable, or no image tower in it.
    """
    try:
        archive = is_torchscript(path)
        state = torch.jit.load(path, map_location="cpu").state_dict() if archive else load_state_dict(path)
        state = {key: value.float() for key, value in state.items() if isinstance(value, torch.Tensor)}
    except Exception as error:  # pickle, zip, safetensors and TorchScript each fail in their own ways
        raise ValueError(f"weights {path}: not a weight file ({first_line(error)})") from error
    whole_model = any(key.startswith("visual.") for key in state)
    # OpenAI's archives carry this number beside the weights; a bare tower is the form of SMILE's release.
    openai = archive or not whole_model or "input_resolution" in state
    if whole_model:
        state = {key: value for key, value in state.items() if key.startswith("visual.")}
    else:
        state = {f"visual.{key}": value for key, value in state.items()}
    if not state.keys() & {"visual.conv1.weight", "visual.trunk.patch_embed.proj.weight"}:
        raise ValueError(f"weights {path}: holds no image tower (no conv1.weight or visual.conv1.weight)")
    return state, openai


def is_torchscript(path: str) -> bool:
    """Return whether a file is a zip that holds TorchScript code, as OpenAI's downloads do."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def find_clip_weights(model: str, weights: str) -> str | None:
    """Return `weights` if it is an open_clip tag, or None if it is a local file or ``random``.

    Raises:
        ValueError: unknown model, or neither a tag nor a file.
    """
    if model not in open_clip.list_models():
        raise ValueError(f"model {model}: not among open_clip's models, e.g. ViT-B-16, ViT-L-14")
    if weights in open_clip.list_pretrained_tags_by_model(model):
        return weights
    if weights != "random" and not Path(weights).is_file():
        raise ValueError(f"weights {weights}: no such file, and no open_clip tag of this model")
    return None


def load_clip(model: str, weights: str, image_size: int | None = None, needs_projection: bool = False) -> ImageModel:
    """Build the image tower of an open_clip model.

    Args:
        model: an open_clip model name, ``ViT-B-16`` in the paper.
        weights: an open_clip tag (``openai``), a local file (see read_clip_weights), or ``random``.
        image_size: side of the frames, if not the model's own; positions are interpolated.
        needs_projection: reject a file without ``proj``, such as SMILE's.
    Raises:
        ValueError: unknown model, weights that cannot be fetched or read, or weights of another model.
    """
    tag, quick_gelu = find_clip_weights(model, weights), weights == "openai"
    state: dict[str, torch.Tensor] = {}
    if not tag and weights != "random":
        state, quick_gelu = read_clip_weights(weights)
    with creating(weights):
        clip: Any = open_clip.create_model(
            model, pretrained=tag, force_quick_gelu=quick_gelu, force_image_size=image_size
        )
    if state:
        try:
            resize_pos_embed(state, clip)
            missing, unknown = clip.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise ValueError(f"weights {weights}: of another model ({last_line(error)})") from error
        needed = {f"visual.{key}" for key in clip.visual.state_dict() if key != "proj" or needs_projection}
        if unknown or needed.intersection(missing):
            lacking = sorted(needed.intersection(missing))
            raise ValueError(f"weights {weights}: of another model (missing {lacking[:2]}, unknown {unknown[:2]})")
    own = open_clip.get_model_preprocess_cfg(clip)
    return ImageModel(clip.visual, to_2tuple(clip.visual.image_size), (own["mean"], own["std"]))


# timm -----------------------------------------------------------------------------------------------------------


def check_timm_weights(model: str, weights: str) -> None:
    """Raise ValueError if timm has no such model, or `weights` is invalid; see load_timm."""
    if not timm.is_model(model):
        raise ValueError(f"model {model}: not among timm's models; timm.list_models() names them")
    if weights not in ("timm", "random") and not weights.startswith("hf-hub:") and not Path(weights).is_file():
        raise ValueError(f"weights {weights}: no such file, and not timm, random or hf-hub:OWNER/NAME")


def load_timm(model: str, weights: str, image_size: int | None = None) -> ImageModel:
    """Build a timm backbone without its classifier.

    Args:
        model: timm's name, with or without the tag of its weights, ``vit_small_patch14_reg4_dinov2.lvd142m``.
        weights: ``timm`` (fetched), ``hf-hub:OWNER/NAME`` (fetched), a local file, or ``random``.
        image_size: side of the frames, if not the model's own; positions are interpolated.
    Raises:
        ValueError: unknown model, or weights that cannot be fetched or read.
    """
    check_timm_weights(model, weights)
    config: Any = timm.get_pretrained_cfg(model)
    # timm's convolutional networks take frames of any size, its transformers are built for one.
    size: dict[str, Any] = {"img_size": image_size} if image_size and config.fixed_input_size else {}
    with creating(weights):
        source = {} if weights in ("timm", "random") else timm_source(weights, config.classifier)
        tower = timm.create_model(
            model, pretrained=weights != "random", num_classes=0, pretrained_cfg_overlay=source, **size
        )
    vars(tower)["pretrained_cfg"].pop("state_dict", None)  # a second copy
    own = timm.data.resolve_model_data_config(tower)
    return ImageModel(tower, to_2tuple(image_size or own["input_size"][-2:]), (own["mean"], own["std"]))


def timm_source(weights: str, classifier: str | tuple[str, ...] | None) -> dict[str, Any]:
    """Make a config for timm to load a file or a model of the hub; rejected unless all tensors but the head fit."""
    if weights.startswith("hf-hub:"):
        state = timm.models.load_state_dict_from_hf(weights.removeprefix("hf-hub:"), weights_only=True)
    else:
        state = timm.models.load_state_dict(weights)
    head = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier or []))
    state = {key: value for key, value in state.items() if not key.startswith(head)}
    return {"state_dict": state, "num_classes": 0, "label_offset": 0}


# Teachers -------------------------------------------------------------------------------------------------------


def build_teacher(
    target: str,
    model: str,
    weights: str,
    norm: str,
    grid: tuple[int, int],
    image_size: int | None = None,
    stage: int = -1,
    dtype: torch.dtype = torch.float32,
) -> FrameTeacher:
    """Build the frozen network of a target, its weights cast once to the precision it computes in.

    Args:
        target: ``clip`` (an open_clip model), ``dino_v1`` (a name of DINO_MODELS) or ``timm`` (any backbone that has a
            spatial map, transformer or convolutional network).
        model, weights, image_size: see load_clip and load_timm.
        norm: statistics of the frames: ``imagenet`` (as the released models), ``clip``, or ``own``: the model's.
        grid: (h, w) of the student.
        stage: which intermediate features of a `timm` model, -1 for the last; ignored by the others.
        dtype: of the weights; targets are fp32 in any case.
    Raises:
        ValueError: as load_clip and load_timm; no such stage, no spatial map, or a CLIP without vision transformer.
    """
    if target == "clip":
        found = load_clip(model, weights, image_size)
        if not (hasattr(found.tower, "trunk") or hasattr(found.tower, "transformer")):
            raise ValueError(f"model {model}: its image tower is not a vision transformer")
        for block in found.tower.modules():
            if isinstance(block, open_clip.transformer.ResidualAttentionBlock) and block.attn.batch_first:
                block.attn = FusedAttention(block.attn)
    else:
        found = load_timm(DINO_MODELS[model] if target == "dino_v1" else model, weights, image_size)
    stage = stage if target == "timm" else -1
    stats = found.norm if norm == "own" else NORMS[norm]
    try:
        teacher = FrameTeacher(found.tower, found.image_size, stats, grid, stage=stage)
    except (AttributeError, AssertionError, RuntimeError, ValueError) as error:  # what towers without a map do
        raise ValueError(f"model {model}: has no spatial map at stage {stage} ({first_line(error)})") from error
    teacher.tower.to(dtype)
    return teacher
