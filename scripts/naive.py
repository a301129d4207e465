"""A straightforward pretraining step: the baseline of scripts/benchmark.py and a reference for tests.

Explicit attention, a convolution for the embedding, boolean indexing, one forward pass per mask. Same parameters and,
up to rounding, same results.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from modeling_finetune import Attention, Block, sinusoid_positions
from modeling_pretrain import PretrainVisionTransformer


def attention(module: Attention, x: torch.Tensor) -> torch.Tensor:
    """``[B, N, D]`` → ``[B, N, D]``, with the whole attention matrix in memory."""
    B, N, D = x.shape
    bias = torch.cat([module.q_bias, torch.zeros_like(module.v_bias), module.v_bias])
    qkv = F.linear(x, module.qkv.weight, bias).reshape(B, N, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    weights = (q * (D // module.num_heads) ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)
    return module.proj((weights @ v).transpose(1, 2).reshape(B, N, D))


def run_blocks(blocks: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    """Apply pre-norm blocks in order."""
    block: Block
    for block in blocks:
        x = x + attention(block.attn, block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    return x


def forward(model: PretrainVisionTransformer, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The same as PretrainVisionTransformer.forward, for one mask per clip: ``[B, N_masked, out_dim]``."""
    B, N = mask.shape
    tokens = model.encoder.patch_embed.proj(x).flatten(2).transpose(1, 2)
    tokens = tokens + sinusoid_positions(N, tokens.shape[-1], x.device)
    visible = tokens[~mask].reshape(B, -1, tokens.shape[-1])
    visible = model.encoder_to_decoder(model.encoder.norm(run_blocks(model.encoder.blocks, visible)))
    D = visible.shape[-1]
    positions = sinusoid_positions(N, D, x.device).expand(B, -1, -1)
    full = torch.cat(
        [visible + positions[~mask].reshape(B, -1, D), model.mask_token + positions[mask].reshape(B, -1, D)], dim=1
    )
    full = model.decoder.norm(run_blocks(model.decoder.blocks, full))
    return model.decoder.head(full)[:, visible.shape[1] :]


def loss(
    model: PretrainVisionTransformer, clips: torch.Tensor, targets: torch.Tensor, masks: torch.Tensor
) -> torch.Tensor:
    """Mean squared error over R masks per clip, masks ``[R·B, N]``, targets ``[B, N, D]``."""
    total = 0.0
    parts = masks.split(len(clips))
    for mask in parts:
        predictions = forward(model, clips, mask)
        total = total + F.mse_loss(predictions, targets[mask].reshape(predictions.shape))
    return total / len(parts)
