"""The GPT that `windlass train` trains, in a few named sizes: plain PyTorch, but for what QK-clip must know of it."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from windlass.attention import attention
from windlass.core.qk_probe import HeadRows, QKProbe

BYTES = 256
"""The vocabulary when a token is a byte."""


@dataclass(frozen=True)
class ModelShape:
    """What decides a GPT; change one part with `dataclasses.replace`."""

    name: str
    width: int
    layers: int
    heads: int
    sequence_length: int
    vocabulary: int = BYTES
    bias: bool = False  # of the projections after attention and in the MLP; LayerNorm always has one
    tied: bool = False  # one matrix is both token embedding and head

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"model {self.name!r}: width {self.width} does not divide by its {self.heads} heads")

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, a tied matrix counted once."""
        matrices = 12 * self.width**2  # 3 for q|k|v, 1 after attention, 4 up, 4 down
        norms = 2 * self.width
        biases = 6 * self.width if self.bias else 0
        embeddings = (self.vocabulary + self.sequence_length) * self.width
        head = 0 if self.tied else self.vocabulary * self.width
        return self.layers * (matrices + 2 * norms + biases) + embeddings + norms + head


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("nano", width=128, layers=5, heads=4, sequence_length=128),
        ModelShape("tiny", width=384, layers=6, heads=6, sequence_length=128),
        ModelShape("small", width=512, layers=8, heads=8, sequence_length=256),
        # GPT-2's own vocabulary, so that it is the model that everybody measures; bytes are its first 256 tokens here.
        ModelShape(
            "gpt2", width=768, layers=12, heads=12, sequence_length=1024, vocabulary=50257, bias=True, tied=True
        ),
    )
}


def find_shape(name: str) -> ModelShape:
    """The named size; an unknown name raises ValueError and lists the known ones."""
    if name in SHAPES:
        return SHAPES[name]
    near = difflib.get_close_matches(name.lower(), SHAPES, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"there is no model named {name!r}, the models are {', '.join(SHAPES)}{hint}")


def build_model(name: str) -> GPT:
    """A new model of a named size; its weights follow from the seed of torch's default generator."""
    return GPT(find_shape(name))


class Linear(nn.Linear):
    """A linear layer that starts with normal weights of a given standard deviation and a bias of 0."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, deviation: float = 0.02) -> None:
        self.deviation = deviation  # before super(), which calls reset_parameters
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.deviation)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """An embedding that starts with normal weights of standard deviation 0.02, as GPT-2's."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and added to what came in."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        width, bias = shape.width, shape.bias
        into_residual = 0.02 / math.sqrt(2 * shape.layers)  # keeps the sum of all branches at the scale of one (GPT-2)
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = Linear(width, 3 * width, bias=False)  # softmax ignores a bias on the keys
        self.matrix_views = {"query_key_value.weight": (width, width, width)}  # three matrices on top of each other
        query, key = (HeadRows("query_key_value.weight", width // shape.heads, first) for first in (0, width))
        self.probe = QKProbe(query, key, heads=shape.heads)
        self.attention_projection = Linear(width, width, bias=bias, deviation=into_residual)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = Linear(width, 4 * width, bias=bias)
        self.down = Linear(4 * width, width, bias=bias, deviation=into_residual)

    def forward(
        self,
        x: Tensor,  # (batch, sequence, width)
    ) -> Tensor:  # the same shape
        batch, sequence, width = x.shape
        packed = self.query_key_value(self.attention_norm(x))
        heads = packed.view(batch, sequence, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, sequence, width / heads)
        mixed = attention(query, key, value, self.probe, causal=True)
        x = x + self.attention_projection(mixed.transpose(1, 2).reshape(batch, sequence, width))
        hidden = F.gelu(self.up(self.mlp_norm(x)), approximate="tanh")
        mlp: Tensor = self.down(hidden)
        return x + mlp


class GPT(nn.Module):
    """A decoder: learned positions, norms before, causal attention, GELU.

    It can be built on the meta device: each module that holds parameters has a `reset_parameters`.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embedding = Embedding(shape.vocabulary, shape.width)
        self.position_embedding = Embedding(shape.sequence_length, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.head.weight = self.token_embedding.weight

    def forward(
        self,
        ids: Tensor,  # (batch, sequence), integers below the vocabulary
        targets: Tensor | None = None,  # the same shape: the next token of each
    ) -> Tensor:  # the mean loss in nats per token, fp32; without targets logits (batch, sequence, vocabulary)
        length = ids.shape[1]
        if length > self.shape.sequence_length:
            most = self.shape.sequence_length
            raise ValueError(f"model {self.shape.name!r} takes at most {most} tokens per sequence, got {length}")
        positions = torch.arange(length, device=ids.device)
        x = self.token_embedding(ids) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
