"""Teachers and targets: what the student has to predict for every token of a clip.

`clip` and `dino_v1` describe the first frame of each tubelet with a frozen image encoder; `pixel` is VideoMAE's
target. Each teacher maps an ImageNet-normalised clip ``[B, 3, T, H, W]`` to targets ``[B, N, D]`` on the student's
token grid, ready for the loss. The student and its loss are elsewhere.
"""

import zipfile
from pathlib import Path

import open_clip
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from open_clip.model import resize_pos_embed
from safetensors.torch import load_file
from timm.layers import to_2tuple

from video_transforms import channel_stats

TARGET_TYPES = ("clip", "dino_v1", "pixel")
DINO_MODELS = {"dino_s": "vit_small_patch16_224.dino", "dino_b": "vit_base_patch16_224.dino"}
EPS = 1e-6


def normalize_features(features: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit (unbiased) std over the tokens of a clip, per channel. ``[B, N, D]`` → the same."""
    features = features.float()
    std, mean = torch.std_mean(features, dim=1, keepdim=True)
    return (features - mean) / (std + EPS)


class PixelTarget(nn.Module):
    """VideoMAE's target: the pixels of each cube, normalised within it per colour. → ``[B, N, 2·16·16·3]``.

    Layout of a target: frame, row, column, colour (p0 p1 p2 c).
    """

    def __init__(self, patch_size: int = 16, tubelet_size: int = 2):
        super().__init__()
        self.patch_size, self.tubelet_size = patch_size, tubelet_size
        self.out_dim = tubelet_size * patch_size**2 * 3
        mean, std = channel_stats("imagenet")
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def compile(self, **options) -> None:
        """Nothing worth compiling."""

    @torch.inference_mode()
    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """ImageNet-normalised ``[B, 3, T, H, W]`` → ``[B, N, out_dim]``, fp32."""
        pixels = clips.float() * self.std + self.mean  # [0, 1]
        cubes = rearrange(
            pixels,
            "b c (t p0) (h p1) (w p2) -> b (t h w) (p0 p1 p2) c",
            p0=self.tubelet_size,
            p1=self.patch_size,
            p2=self.patch_size,
        )
        return rearrange(normalize_features(cubes.flatten(0, 1)), "(b n) p c -> b n (p c)", b=len(clips))


class FrameTeacher(nn.Module):
    """A frozen image encoder on the first frame of each tubelet.

    Args:
        tower: open_clip's or timm's image encoder.
        image_size: side it is fed with, pixels; frames of another size are resized.
        norm: statistics it is fed with; clips come in ImageNet-normalised, as the released models took them.
        grid: (h, w) of the student; patch features on another grid are resized bilinearly.
        tubelet_size: frames a token covers.
    """

    def __init__(
        self, tower: nn.Module, image_size: tuple[int, int], norm: str, grid: tuple[int, int], tubelet_size: int = 2
    ):
        super().__init__()
        self.tower = tower.eval().requires_grad_(False)
        self.image_size, self.grid, self.tubelet_size = image_size, grid, tubelet_size
        (mean, std), (to_mean, to_std) = channel_stats("imagenet"), channel_stats(norm)
        self.register_buffer("scale", (std / to_std)[..., 0], persistent=False)  # [3, 1, 1], of a frame
        self.register_buffer("shift", ((mean - to_mean) / to_std)[..., 0], persistent=False)
        with torch.inference_mode():
            self.out_dim = self.patch_features(torch.zeros(1, 3, *image_size)).shape[-1]

    def train(self, mode: bool = True) -> "FrameTeacher":
        """A frozen teacher stays in eval mode."""
        return super().train(False)

    def compile(self, **options) -> None:
        """Compile the network, inside of inference mode, which torch.compile cannot trace."""
        self.patch_features = torch.compile(self.patch_features, **options)

    def patch_features(self, frames: torch.Tensor) -> torch.Tensor:
        """``[B, 3, H, W]`` → all patch tokens of the last layer after its final norm, ``[B, h·w, D]``.

        No class token, no projection to the joint space.
        """
        trunk = getattr(self.tower, "trunk", self.tower)  # open_clip wraps timm's towers
        if hasattr(trunk, "forward_features"):
            return trunk.forward_features(frames)[:, trunk.num_prefix_tokens :]
        last = len(self.tower.transformer.resblocks) - 1
        return self.tower.forward_intermediates(
            frames, indices=[last], normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
        )["image_intermediates"][0]

    @torch.inference_mode()
    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """ImageNet-normalised ``[B, 3, T, H, W]`` → normalised targets ``[B, t·h·w, D]``, fp32."""
        return normalize_features(self.tokens(clips))

    def tokens(self, clips: torch.Tensor) -> torch.Tensor:
        """The features themselves, ``[B, 3, T, H, W]`` → ``[B, t·h·w, D]``, time first."""
        frames = rearrange(clips[:, :, :: self.tubelet_size], "b c t h w -> (b t) c h w")
        frames = frames * self.scale + self.shift
        if frames.shape[-2:] != self.image_size:
            frames = F.interpolate(frames, size=self.image_size, mode="bilinear", antialias=True)
        tokens = self.patch_features(frames)  # [B·t, h'·w', D]
        grid = [side // patch for side, patch in zip(self.image_size, self.patch_size)]
        if grid != list(self.grid):
            maps = rearrange(tokens.float(), "b (h w) d -> b d h w", h=grid[0])
            maps = F.interpolate(maps, size=self.grid, mode="bilinear", align_corners=False)
            tokens = rearrange(maps, "b d h w -> b (h w) d")
        return rearrange(tokens, "(b t) n d -> b (t n) d", b=len(clips))

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of the teacher's patches, pixels."""
        trunk = getattr(self.tower, "trunk", self.tower)
        size = trunk.patch_embed.patch_size if hasattr(trunk, "patch_embed") else trunk.patch_size
        return tuple(size)


def read_clip_weights(path: str) -> tuple[dict[str, torch.Tensor], bool]:
    """Image-tower weights from a local file, with bare keys (``conv1.weight``, ``transformer.resblocks…``).

    Takes OpenAI's JIT archive, a state dict of the whole model (``visual.`` keys, also under ``state_dict`` and
    ``module.``), of the image tower alone, or safetensors of either.

    Returns:
        The state dict, and whether it is OpenAI's (then the tower's activation is QuickGELU).
    Raises:
        ValueError: not a file, unreadable, or no image tower in it.
    """
    try:
        state, archive = _read_tensors(path)
    except Exception as error:  # pickle, zip, safetensors and TorchScript each fail in their own ways
        raise ValueError(f"--clip_weights {path}: not a weight file ({_first_line(error)})") from error
    state = {key.removeprefix("module."): value for key, value in state.items()}
    whole_model = any(key.startswith("visual.") for key in state)
    # OpenAI's archives carry these three beside the weights; a bare tower is the form of SMILE's release.
    openai = archive or not whole_model or "input_resolution" in state
    tower = {
        key.removeprefix("visual."): value
        for key, value in state.items()
        if key.startswith("visual.") or not whole_model
    }
    if not any(key in tower for key in ("conv1.weight", "trunk.patch_embed.proj.weight")):
        raise ValueError(f"--clip_weights {path}: holds no image tower (no conv1.weight or visual.conv1.weight)")
    return tower, openai


def _read_tensors(path: str) -> tuple[dict[str, torch.Tensor], bool]:
    """All tensors of a weight file, fp32, and whether it was a TorchScript archive."""
    if path.endswith(".safetensors"):
        state, archive = load_file(path), False
    elif _is_torchscript(path):
        state, archive = torch.jit.load(path, map_location="cpu").state_dict(), True
    else:
        state, archive = torch.load(path, map_location="cpu", weights_only=True), False
        state = state.get("state_dict", state)
    return {key: value.float() for key, value in state.items() if isinstance(value, torch.Tensor)}, archive


def _is_torchscript(path: str) -> bool:
    """Whether a file is a zip that holds TorchScript code, as OpenAI's downloads are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def _load_tower(model: nn.Module, state: dict[str, torch.Tensor], path: str) -> None:
    """Put image-tower weights into a whole open_clip model, its positions interpolated to the model's grid."""
    state = {f"visual.{key}": value for key, value in state.items()}
    try:
        resize_pos_embed(state, model)
        state = {key.removeprefix("visual."): value for key, value in state.items()}
        missing, unexpected = model.visual.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"--clip_weights {path}: of another model ({str(error).splitlines()[-1].strip()})") from error
    missing = [key for key in missing if key != "proj"]  # the projection is not used, and SMILE's file lacks it
    if missing or unexpected:
        raise ValueError(f"--clip_weights {path}: of another model (missing {missing[:2]}, unknown {unexpected[:2]})")


def find_clip_weights(model: str, weights: str) -> str | None:
    """The open_clip tag that `weights` names, or None: then it is a local file, or ``random``.

    Raises:
        ValueError: unknown model, or neither a tag nor a file.
    """
    if model not in open_clip.list_models():
        raise ValueError(f"--clip_model {model}: not among open_clip's models, e.g. ViT-B-16, ViT-L-14")
    if weights in open_clip.list_pretrained_tags_by_model(model):
        return weights
    if weights != "random" and not Path(weights).is_file():
        raise ValueError(f"--clip_weights {weights}: no such file, and no open_clip tag of this model")
    return None


def build_clip(
    model: str, weights: str, norm: str, grid: tuple[int, int], image_size: int | None = None
) -> FrameTeacher:
    """CLIP's image tower.

    Args:
        model: an open_clip model name, ``ViT-B-16`` in the paper.
        weights: an open_clip tag (``openai``), a local file (see read_clip_weights), or ``random``.
        norm: ``imagenet`` (as the released models) or ``clip``.
        image_size: feed another size than the model's own; positions are interpolated.
    Raises:
        ValueError: unknown model, weights that cannot be had, or weights of another model.
    """
    state, tag, quick_gelu = None, find_clip_weights(model, weights), weights == "openai"
    if not tag and weights != "random":
        state, quick_gelu = read_clip_weights(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # `random` is the same teacher in every process and after a resume
        try:
            clip = open_clip.create_model(
                model, pretrained=tag, force_quick_gelu=quick_gelu, force_image_size=image_size
            )
        except Exception as error:  # whatever the network gives
            raise ValueError(
                f"--clip_weights {weights}: open_clip could not fetch it ({_first_line(error)}); "
                "download it elsewhere and give the file's path"
            ) from error
    if not (hasattr(clip.visual, "trunk") or hasattr(clip.visual, "transformer")):
        raise ValueError(f"--clip_model {model}: its image tower is no vision transformer")
    if state is not None:
        _load_tower(clip, state, weights)
    return FrameTeacher(clip.visual, to_2tuple(clip.visual.image_size), norm, grid)


def build_dino(
    name: str, weights: str, norm: str, grid: tuple[int, int], image_size: int | None = None
) -> FrameTeacher:
    """DINO ViT-S/16 (`dino_s`) or ViT-B/16 (`dino_b`); `weights`: ``timm`` (fetched), a local file or ``random``.

    Raises:
        ValueError: weights that cannot be had or read.
    """
    if weights not in ("timm", "random") and not Path(weights).is_file():
        raise ValueError(f"--dino_weights {weights}: no such file")
    source = {} if weights in ("timm", "random") else {"pretrained_cfg_overlay": {"file": weights}}
    size = {"img_size": image_size} if image_size else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            tower = timm.create_model(
                DINO_MODELS[name], pretrained=weights != "random", num_classes=0, **size, **source
            )
        except Exception as error:  # whatever the network or a wrong file gives
            raise ValueError(
                f"--dino_weights {weights}: could not be loaded ({_first_line(error)}); "
                "download the weights elsewhere and give the file's path"
            ) from error
    return FrameTeacher(tower, tuple(tower.patch_embed.img_size), norm, grid)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
