"""The video vision transformer: normalisation of its input, tubelet embedding, blocks, sizes, and the classifier.

modeling_pretrain.py builds its encoder and decoder from the same parts. Parameter names are those of the released
VideoMAE and SMILE checkpoints. Shapes: B clips, N = t·h·w tokens in the order time, row, column, D width. A tubelet is
the cube of 2 x 16 x 16 pixels that becomes one token; the flag --add_tubelets means pasted moving objects instead.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import DropPath, Mlp
from torch.utils.checkpoint import checkpoint

PATCH_SIZE, TUBELET_SIZE = 16, 2
NORMS = {"imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)}


@dataclass(frozen=True)
class Size:
    """Width, depth and heads of an encoder, and of the decoder that pretrains it."""

    embed_dim: int
    depth: int
    num_heads: int
    decoder_embed_dim: int
    decoder_num_heads: int


SIZES = {
    "tiny": Size(192, 4, 3, 96, 3),  # for the mini world and tests; not in the paper
    "small": Size(384, 12, 6, 192, 3),
    "base": Size(768, 12, 12, 384, 6),
    "large": Size(1024, 24, 16, 512, 8),
    "huge": Size(1280, 32, 16, 640, 8),
}


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with eps 1e-6, in the precision of its input (statistics in fp32).

    Autocast runs nn.LayerNorm in fp32, so that the next layer has to cast its output back.
    """

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return torch.native_layer_norm(x, self.normalized_shape, weight, bias, self.eps)[0]


def token_grid(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Token grid (t, h, w) of a clip.

    Raises:
        ValueError: a side that the patch or tubelet does not divide.
    """
    if num_frames % TUBELET_SIZE or num_frames < TUBELET_SIZE:
        raise ValueError(f"num_frames {num_frames} is not divisible by the tubelet size {TUBELET_SIZE}")
    for side in (height, width):
        if side % PATCH_SIZE or side < PATCH_SIZE:
            raise ValueError(f"input_size {side} is not divisible by the patch size {PATCH_SIZE}")
    return num_frames // TUBELET_SIZE, height // PATCH_SIZE, width // PATCH_SIZE


def channel_stats(norm: str, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of `norm`, one of NORMS, for RGB in [0, 1], each ``[3, 1, 1, 1]``."""
    mean, std = NORMS[norm]
    return torch.tensor(mean, device=device).view(3, 1, 1, 1), torch.tensor(std, device=device).view(3, 1, 1, 1)


def normalize_clips(clips: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """uint8 ``[B, 3, T, H, W]`` → float of the same shape, (x / 255 - mean) / std; mean and std ``[3, 1, 1, 1]``."""
    return (clips.float() / 255 - mean) / std


@torch.compiler.assume_constant_result  # else each compiled step computes them again, in float64
def sinusoid_positions(
    num_tokens: int, dim: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Fixed positions ``[1, N, D]``: sin on even, cos on odd channels of n / 10000^(2·(i//2)/D) (Vaswani et al., 3.5).

    One dimension over all tokens, not one per axis: kept for the released weights.
    """
    positions = _positions(num_tokens, dim, device, dtype)
    if type(positions) is not torch.Tensor:  # a fake tensor of torch.export must not stay in the cache
        _positions.cache_clear()
    return positions


@lru_cache
def _positions(num_tokens: int, dim: int, device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    position = torch.arange(num_tokens, dtype=torch.float64, device=device)[:, None]
    channel = torch.arange(dim, device=device)
    power = 2 * (channel // 2).double() / dim
    angle = position / 10000**power
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).to(dtype)[None]


class TubeletEmbed(nn.Module):
    """Cut a clip into tubelets and project each: ``[B, 3, T, H, W]`` → ``[B, N, D]``.

    `proj` is a Conv3d so that released weights load. As its kernel equals its stride, it is computed as a matrix
    product, which is faster and can be applied to some of the tubelets only.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        kernel = (TUBELET_SIZE, PATCH_SIZE, PATCH_SIZE)
        self.proj = nn.Conv3d(3, embed_dim, kernel_size=kernel, stride=kernel)

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, 3, T, H, W]`` → pixels of each tubelet in the order of the kernel, ``[B, N, 3·2·16·16]``."""
        return rearrange(x, "b c (t p) (h q) (w r) -> b (t h w) (c p q r)", p=TUBELET_SIZE, q=PATCH_SIZE, r=PATCH_SIZE)

    def project(self, tubelets: torch.Tensor) -> torch.Tensor:
        """``[B, M, 3·2·16·16]`` → ``[B, M, D]``."""
        return F.linear(tubelets, self.proj.weight.flatten(1), self.proj.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(self.cut(x))


class Attention(nn.Module):
    """Multi-head self-attention with biases on queries and values only (a key bias cancels in the softmax)."""

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads, self.attn_drop = num_heads, attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, D = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, N, D / heads]
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, D)))


class Block(nn.Module):
    """Pre-norm transformer block, ``[B, N, D]`` → ``[B, N, D]``."""

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0, drop: float = 0.0, attn_drop: float = 0.0):
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, attn_drop, drop)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim, drop=(0.0, drop))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def make_blocks(dim: int, depth: int, num_heads: int, drop_path_rate: float = 0.0, **drops: float) -> nn.ModuleList:
    """`depth` blocks whose drop path grows linearly from 0 to `drop_path_rate`."""
    rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
    return nn.ModuleList(Block(dim, num_heads, rate, **drops) for rate in rates)


def run_blocks(blocks: nn.ModuleList, x: torch.Tensor, use_checkpoint: bool) -> torch.Tensor:
    """Apply blocks in order, optionally with activation checkpointing."""
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if use_checkpoint and x.requires_grad else block(x)
    return x


class VisionTransformer(nn.Module):
    """Classifier: encoder on all tokens, mean over tokens, LayerNorm, linear head.

    Args:
        num_classes: 0 returns pooled features instead of logits.
        drop_rate, attn_drop_rate, drop_path_rate: dropout of the blocks; fc_drop_rate: before the head.
        init_scale: factor on the head's initial weights.
    """

    def __init__(
        self,
        size: Size,
        num_classes: int = 400,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        fc_drop_rate: float = 0.0,
        init_scale: float = 0.001,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        self.embed_dim, self.use_checkpoint = size.embed_dim, use_checkpoint
        self.patch_embed = TubeletEmbed(size.embed_dim)
        self.blocks = make_blocks(
            size.embed_dim, size.depth, size.num_heads, drop_path_rate, drop=drop_rate, attn_drop=attn_drop_rate
        )
        self.fc_norm = LayerNorm(size.embed_dim)
        self.fc_dropout = nn.Dropout(fc_drop_rate)
        self.head = nn.Linear(size.embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(self._init_weights)
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            with torch.no_grad():
                self.head.weight.mul_(init_scale)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Layers for timm's layer-wise decay: the embedding, each block, and the rest (norm and head)."""
        return {"stem": r"^patch_embed\.", "blocks": r"^blocks\.(\d+)\."}

    def forward_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, 3, T, H, W]`` → tokens after the last block, ``[B, N, D]``."""
        x = self.patch_embed(x)
        x = x + sinusoid_positions(x.shape[1], self.embed_dim, x.device, x.dtype)
        return run_blocks(self.blocks, x, self.use_checkpoint)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, 3, T, H, W]`` → ``[B, D]``: tokens averaged, then normalised."""
        return self.fc_norm(self.forward_tokens(x).mean(dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, 3, T, H, W]`` (ImageNet-normalised) → logits ``[B, num_classes]``."""
        return self.head(self.fc_dropout(self.forward_features(x)))


vit_tiny_patch16_224 = partial(VisionTransformer, SIZES["tiny"])
vit_small_patch16_224 = partial(VisionTransformer, SIZES["small"])
vit_base_patch16_224 = partial(VisionTransformer, SIZES["base"])
vit_large_patch16_224 = partial(VisionTransformer, SIZES["large"])
vit_huge_patch16_224 = partial(VisionTransformer, SIZES["huge"])
MODELS = {f"vit_{name}_patch16_224": globals()[f"vit_{name}_patch16_224"] for name in SIZES}
