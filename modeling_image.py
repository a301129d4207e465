"""Image models of open_clip and timm as video encoders, for comparison: a video is the mean of its frames' features.

Features are CLIP's embedding and timm's pooled features. To probes and nearest neighbours a frame is a token,
``[B, T, D]``.
"""

import open_clip
import timm
import torch
from einops import rearrange

from modeling_teacher import FrameTower, check_timm_weights, find_clip_weights, load_clip, load_timm

LIBRARIES = {"open_clip": "openai", "timm": "timm"}  # their usual weights


class FrameEncoder(FrameTower):
    """Applies a frozen image encoder, frames → features ``[B, D]``, to every frame; see FrameTower."""

    def __init__(self, tower, image_size, norm):
        super().__init__(tower, image_size, norm)
        with torch.inference_mode():
            self.embed_dim = self.tower(torch.zeros(1, 3, *image_size)).shape[1]

    @property
    def num_heads(self) -> int:
        """Number of heads of an attentive probe: 64 wide each if that divides the width of the features, else 1."""
        return self.embed_dim // 64 if self.embed_dim % 64 == 0 else 1

    def forward_tokens(self, clips: torch.Tensor) -> torch.Tensor:
        """ImageNet-normalised ``[B, 3, T, H, W]`` → features of the frames, ``[B, T, D]``."""
        frames = self.frames(clips).contiguous(memory_format=torch.channels_last)
        return rearrange(self.tower(frames), "(b t) d -> b t d", b=len(clips))


def find_encoder(name: str, weights: str) -> tuple[str, str, str]:
    """Find the library of a model; returns (library, name in it, weights).

    Args:
        name: name of a model, after ``open_clip/`` or ``timm/`` if both libraries have one.
        weights: see load_clip and load_timm; empty: OpenAI's, or timm's for this model.
    Raises:
        ValueError: unknown, or ambiguous.
    """
    library, _, bare = name.rpartition("/")
    has = {"open_clip": bare in open_clip.list_models(), "timm": timm.is_model(bare)}
    found = [where for where in LIBRARIES if has[where] and library in ("", where)]
    if not found:
        raise ValueError(f"model {name}: not a model of {library or 'open_clip or timm'}")
    if len(found) > 1:
        raise ValueError(f"model {name}: open_clip and timm both have one: put open_clip/ or timm/ before it")
    weights = weights or LIBRARIES[found[0]]
    check = find_clip_weights if found[0] == "open_clip" else check_timm_weights
    check(bare, weights)
    return found[0], bare, weights


def build_encoder(name: str, weights: str = "") -> FrameEncoder:
    """Build an image model with the input size and statistics it was trained with; see find_encoder.

    Raises:
        ValueError: as find_encoder; weights that cannot be fetched or do not fit.
    """
    library, name, weights = find_encoder(name, weights)
    if library == "timm":
        return FrameEncoder(*load_timm(name, weights))
    return FrameEncoder(*load_clip(name, weights, needs_projection=True))
