"""Evaluation of a frozen encoder: its features, linear and attentive probes, and nearest neighbours.

P probes, one for each learning rate and weight decay, are trained side by side on the same features.
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Mlp

from modeling_finetune import TUBELET_SIZE, LayerNorm, VisionTransformer
from modeling_image import FrameEncoder

QUERIES = 64  # test features per block of nearest_neighbours: 60 MB of similarities to 240,000 training features
TokenEncoder = VisionTransformer | FrameEncoder  # forward_tokens: clips [B, 3, T, H, W] → tokens [B, N, D]


class LinearProbe(nn.Module):
    """Mean over tokens, BatchNorm without affine parameters (as MAE's probe), linear: ``[B, N, D]`` → ``[B, C]``."""

    def __init__(self, dim: int, num_heads: int, num_classes: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(tokens.mean(dim=1)))


class AttentiveProbe(nn.Module):
    """One learned query attends to all tokens, an MLP, linear: ``[B, N, D]`` → ``[B, C]`` (V-JEPA's probe)."""

    def __init__(self, dim: int, num_heads: int, num_classes: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm = LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.mlp_norm = LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.head_norm = LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        for weight in (self.query, self.head.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(tokens)
        pooled, _ = self.attention(self.query.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)
        pooled = pooled + self.query
        pooled = pooled + self.mlp(self.mlp_norm(pooled))
        return self.head(self.head_norm(pooled[:, 0]))


PROBES = {"linear": LinearProbe, "attentive": AttentiveProbe}


class ProbedEncoder(nn.Module):
    """A frozen encoder with P probes.

    Args:
        kind: linear | attentive.
        lr_wd: learning rate and weight decay of each probe.
    """

    def __init__(
        self, encoder: TokenEncoder, num_heads: int, kind: str, num_classes: int, lr_wd: list[tuple[float, float]]
    ):
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.lr_wd = lr_wd
        self.probes = nn.ModuleList(PROBES[kind](encoder.embed_dim, num_heads, num_classes) for _ in lr_wd)
        self.best = nn.Buffer(torch.tensor(0))  # index of the probe with the best validation result

    def train(self, mode: bool = True) -> "ProbedEncoder":
        """Set the mode of the probes; the encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, 3, T, H, W]`` → logits of all probes ``[B, P, C]``."""
        with torch.no_grad():
            tokens = self.encoder.forward_tokens(x)
        return torch.stack([probe(tokens) for probe in self.probes], dim=1)

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict]:
        """One group per probe, with its rate and decay as multiples of the scheduled `lr` and `weight_decay`."""
        groups = []
        for probe, (rate, decay) in zip(self.probes, self.lr_wd):
            scales = {"wd_scale": decay / weight_decay, "lr_scale": rate / lr}
            groups.append({"params": list(probe.parameters()), "weight_decay": decay, **scales})
        return groups


class Features(nn.Module):
    """Clips ``[B, 3, T, H, W]`` → features of each: mean ``[B, D]``, time ``[B, t, D]`` or token ``[B, N, D]``."""

    def __init__(self, encoder: TokenEncoder, kind: str = "mean"):
        super().__init__()
        self.encoder, self.kind = encoder, kind

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        tokens = self.encoder.forward_tokens(clips)
        if self.kind == "time":
            return tokens.unflatten(1, (clips.shape[2] // TUBELET_SIZE, -1)).mean(dim=2)
        return tokens.mean(dim=1) if self.kind == "mean" else tokens


class ProbeLoss(nn.Module):
    """Sum of the losses of all probes, each of which gets its own gradient: logits ``[B, P, C]``, labels ``[B]``.

    Args:
        losses: logits ``[n, C]`` and labels ``[n]`` or ``[n, C]`` → loss of each sample, ``[n]``.
    """

    def __init__(self, losses: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.losses = losses

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        B, P, _ = logits.shape
        return self.losses(logits.flatten(0, 1), labels.repeat_interleave(P, dim=0)).sum() / B


def nearest_neighbours(
    train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, k: int, num_classes: int, temperature: float = 0.07
) -> torch.Tensor:
    """Weighted k-NN vote by cosine similarity, weights exp(similarity / temperature) (Wu et al. 2018; DINO).

    Args:
        train: features ``[n, D]`` with labels ``[n]``, or multi-hot labels ``[n, num_classes]``; test: ``[m, D]``.
    Returns:
        Class scores ``[m, num_classes]``: share of the votes; with single labels they sum to 1.
    """
    train, parts = F.normalize(train, dim=1), []
    for queries in F.normalize(test, dim=1).split(QUERIES):
        similarity, nearest = (queries @ train.T).topk(min(k, len(train)), dim=1)
        weights, votes = (similarity / temperature).exp(), similarity.new_zeros(len(queries), num_classes)
        for weight, chosen in zip(weights.T, labels[nearest].transpose(0, 1)):  # [m], and [m] or [m, num_classes]
            votes += weight[:, None] * (F.one_hot(chosen, num_classes) if labels.ndim == 1 else chosen)
        parts.append(votes / weights.sum(dim=1, keepdim=True))
    return torch.cat(parts) if parts else train.new_empty(0, num_classes)
