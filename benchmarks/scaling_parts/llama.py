"""Llama 3 in plain PyTorch: the shapes of its matrices, and a small copy that really trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaShape:
    """What decides the matrices."""

    name: str
    layers: int
    width: int
    heads: int
    key_value_heads: int
    hidden: int  # of the gated MLP
    vocabulary: int


SHAPES = {
    # Grattafiori et al. 2024, "The Llama 3 Herd of Models", table 3.
    "8B": LlamaShape("8B", 32, 4096, 32, 8, 14336, 128256),
    "70B": LlamaShape("70B", 80, 8192, 64, 8, 28672, 128256),
    # The proportions of the 8B, scaled down: 8 layers of seven matrices.
    "small": LlamaShape("small", 8, 64, 8, 2, 224, 256),
}


class Layer(nn.Module):
    """Grouped-query attention and a gated MLP. Positions are left out: they have no weights."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        width, narrow = shape.width, shape.width * shape.key_value_heads // shape.heads
        self.heads = shape.heads
        self.attention_norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, narrow, bias=False)
        self.value = nn.Linear(width, narrow, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.gate = nn.Linear(width, shape.hidden, bias=False)
        self.up = nn.Linear(width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, width) to the same."""
        normal = self.attention_norm(x)
        parts = [
            project(normal).unflatten(-1, (-1, x.shape[-1] // self.heads)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        ]
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(-2))
        normal = self.mlp_norm(x)
        down: Tensor = self.down(F.silu(self.gate(normal)) * self.up(normal))
        return x + down


class Llama(nn.Module):
    """The decoder; it can be built on the meta device."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Both (batch, sequence); the mean loss."""
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def build_on_meta(shape: LlamaShape) -> Llama:
    """Shapes without memory."""
    with torch.device("meta"):
        return Llama(shape)
