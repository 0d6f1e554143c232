"""What an attention module declares for QK-clip: which rows of which parameters are its heads, and where the largest
logits of its passes add up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadRows:
    """Rows of a parameter [rows, ...] that belong to heads: head i has the `rows` rows from `first + i * stride` on."""

    name: str  # of the parameter, in the module that holds the probe; the bias beside a weight goes with it
    rows: int  # of one head
    first: int = 0
    stride: int | None = None  # rows from one head to the next; None: there is nothing between them

    @property
    def step(self) -> int:
        return self.rows if self.stride is None else self.stride


class QKProbe:
    """Of one attention, kept in an attribute of its module: its heads, and the largest logit q.k * scale of each since
    the last optimizer step. It does nothing unless an engine with `muon.qk_clip` uses it.

    `key_heads` divides `heads`: query head i reads key head i // (heads // key_heads), as in grouped-query attention.
    `query_alone` are rows of queries whose keys all heads share and nobody scales, as the rotary part of multi-head
    latent attention.
    """

    def __init__(
        self,
        query: HeadRows | Sequence[HeadRows],
        key: HeadRows | Sequence[HeadRows],
        *,
        heads: int,
        key_heads: int | None = None,  # None: as many as heads
        query_alone: HeadRows | Sequence[HeadRows] = (),
    ) -> None:
        self.heads = heads
        self.key_heads = heads if key_heads is None else key_heads
        if self.key_heads < 1 or heads < 1 or heads % self.key_heads:
            raise ValueError(
                f"QKProbe got {heads} heads and {self.key_heads} key heads, wanted as many query heads for each key "
                "head: give a number of key heads that divides the number of heads"
            )
        self.query, self.key, self.query_alone = _listed(query), _listed(key), _listed(query_alone)
        self.listens = False
        """Whether somebody wants the maxima; where not, finding them is for nothing."""
        self._maxima: Tensor | None = None

    def observe(self, maxima: Tensor, output: Tensor | None = None) -> None:
        """Take the largest logit of each head [heads] in one pass, masked ones left out. With the pass's `output` they
        count when a backward pass reaches it, which a pass of evaluation never sees; without, at once."""
        if not self.listens:
            return
        if maxima.shape != (self.heads,):
            raise ValueError(
                f"QKProbe.observe got maxima of shape {list(maxima.shape)}, wanted [{self.heads}]: one for each head"
            )
        seen = maxima.detach().to(torch.float32)
        if output is None:
            self._add(seen)
        elif output.requires_grad:
            output.register_hook(lambda _: self._add(seen))

    def _add(self, seen: Tensor) -> None:
        if self.listens:  # the engine may have been closed since the forward pass
            self._maxima = seen if self._maxima is None else torch.maximum(self._maxima, seen)

    @property
    def maxima(self) -> Tensor | None:
        """[heads] fp32 on the device; None if no pass has been observed since the last optimizer step."""
        return self._maxima

    def forget(self) -> None:
        """Start again from no pass."""
        self._maxima = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are declarations that nobody uses yet."""
        return _rebuild, (self.query, self.key, self.heads, self.key_heads, self.query_alone)


def _rebuild(
    query: tuple[HeadRows, ...],
    key: tuple[HeadRows, ...],
    heads: int,
    key_heads: int,
    query_alone: tuple[HeadRows, ...],
) -> QKProbe:
    return QKProbe(query, key, heads=heads, key_heads=key_heads, query_alone=query_alone)


def _listed(rows: HeadRows | Sequence[HeadRows]) -> tuple[HeadRows, ...]:
    return (rows,) if isinstance(rows, HeadRows) else tuple(rows)


def find_probes(module: nn.Module) -> Iterator[tuple[str, str, QKProbe]]:
    """(path of the module, name of the attribute, probe) of every probe, in order of definition."""
    for path, inner in module.named_modules():
        for name, value in vars(inner).items():
            if isinstance(value, QKProbe):
                yield path, name, value
