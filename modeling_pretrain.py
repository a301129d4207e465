"""The student: a masked video autoencoder, in the order of the paper.

Embed tubelets, keep the visible tokens, encode them, put mask tokens in place of the hidden ones, decode, and
predict a feature for every hidden token. The loss and its targets live in engine_for_pretraining.py and
modeling_teacher.py. Masks are bool ``[B, N]``, True = hidden (see masking_generator.py).
"""

from functools import partial

import torch
import torch.nn as nn

from modeling_finetune import SIZES, LayerNorm, Size, TubeletEmbed, make_blocks, run_blocks, sinusoid_positions


def split_tokens(mask: torch.Tensor, num_masked: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the visible and of the hidden tokens, each in token order.

    Args:
        mask: bool ``[B, N]``, the same number of True in every row.
        num_masked: that number, if known; counting it makes the CPU wait for the device.
    Returns:
        int64 ``[B, N_visible]`` and ``[B, N_masked]``.
    """
    if num_masked is None:
        counts = mask.sum(dim=1)
        num_masked = int(counts[0])
        if (counts != num_masked).any():
            raise ValueError(f"every mask must hide the same number of tokens, got {counts.tolist()}")
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)  # False before True
    return order[:, : mask.shape[1] - num_masked], order[:, mask.shape[1] - num_masked :]


def take_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``x [B, N, D]``, ``index [R·B, M]`` → ``[R·B, M, D]``: row r·B + b takes from clip b."""
    B, N, D = x.shape
    row = torch.arange(index.shape[0], device=x.device) % B * N
    return x.flatten(0, 1).index_select(0, (row[:, None] + index).flatten()).view(*index.shape, D)


@torch.compiler.assume_constant_result
def decoder_positions(num_tokens: int, dim: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """sinusoid_positions under a second name: torch.compile takes only one constant of each name into a graph."""
    return sinusoid_positions(num_tokens, dim, device, dtype)


class Encoder(nn.Module):
    """ViT that sees the visible tokens only: ``[B, 3, T, H, W]`` and their indices → ``[R·B, N_visible, D]``."""

    def __init__(self, size: Size, drop_path_rate: float, use_checkpoint: bool):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.patch_embed = TubeletEmbed(size.embed_dim)
        self.blocks = make_blocks(size.embed_dim, size.depth, size.num_heads, drop_path_rate)
        self.norm = LayerNorm(size.embed_dim)

    def forward(self, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        tubelets = self.patch_embed.cut(x)  # [B, N, 1536]
        x = self.patch_embed.project(take_tokens(tubelets, visible))  # hidden ones are not even embedded
        x = x + take_tokens(sinusoid_positions(tubelets.shape[1], x.shape[2], x.device, x.dtype), visible)
        return self.norm(run_blocks(self.blocks, x, self.use_checkpoint))


class Decoder(nn.Module):
    """Shallow ViT over all tokens; the head reads the last `num_masked`: → ``[B, N_masked, out_dim]``."""

    def __init__(self, size: Size, depth: int, out_dim: int, use_checkpoint: bool):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.blocks = make_blocks(size.decoder_embed_dim, depth, size.decoder_num_heads)
        self.norm = LayerNorm(size.decoder_embed_dim)
        self.head = nn.Linear(size.decoder_embed_dim, out_dim)

    def forward(self, x: torch.Tensor, num_masked: int) -> torch.Tensor:
        x = run_blocks(self.blocks, x, self.use_checkpoint)
        return self.head(self.norm(x[:, -num_masked:]))


class PretrainVisionTransformer(nn.Module):
    """SMILE's student.

    Args:
        size: widths and depths, one of modeling_finetune.SIZES.
        decoder_depth: 4 in every SMILE run.
        decoder_num_classes: width of the target features (CLIP-B 768, pixels 1536).
        drop_path_rate: of the encoder's last block, growing linearly from 0.
        use_checkpoint: recompute activations in the backward pass.
    """

    def __init__(
        self,
        size: Size,
        decoder_depth: int = 4,
        decoder_num_classes: int = 768,
        drop_path_rate: float = 0.0,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        self.encoder = Encoder(size, drop_path_rate, use_checkpoint)
        self.decoder = Decoder(size, decoder_depth, decoder_num_classes, use_checkpoint)
        self.encoder_to_decoder = nn.Linear(size.embed_dim, size.decoder_embed_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.decoder_embed_dim))
        self.apply(self._init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, num_masked: int | None = None) -> torch.Tensor:
        """Predict the features of the hidden tokens.

        Args:
            x: ``[B, 3, T, H, W]``, ImageNet-normalised.
            mask: bool ``[R·B, N]``, True = hidden; R masks per clip, row r·B + b belongs to clip b.
            num_masked: hidden tokens per row, if known (spares a device synchronisation).
        Returns:
            ``[R·B, N_masked, decoder_num_classes]``, in token order.
        Raises:
            ValueError: rows that hide different numbers of tokens.
        """
        visible, hidden = split_tokens(mask, num_masked)
        x = self.encoder_to_decoder(self.encoder(x, visible))  # [R·B, N_visible, D_decoder]
        positions = decoder_positions(mask.shape[1], x.shape[2], x.device, x.dtype)
        mask_tokens = self.mask_token.to(x.dtype) + take_tokens(positions, hidden)
        x = torch.cat([x + take_tokens(positions, visible), mask_tokens], dim=1)
        return self.decoder(x, hidden.shape[1])


pretrain_videomae_tiny_patch16_224 = partial(PretrainVisionTransformer, SIZES["tiny"])
pretrain_videomae_small_patch16_224 = partial(PretrainVisionTransformer, SIZES["small"])
pretrain_videomae_base_patch16_224 = partial(PretrainVisionTransformer, SIZES["base"])
pretrain_videomae_large_patch16_224 = partial(PretrainVisionTransformer, SIZES["large"])
pretrain_videomae_huge_patch16_224 = partial(PretrainVisionTransformer, SIZES["huge"])
MODELS = {f"pretrain_videomae_{name}_patch16_224": globals()[f"pretrain_videomae_{name}_patch16_224"] for name in SIZES}
