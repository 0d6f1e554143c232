"""Models whose matrices come in every shape that Muon must tell apart, and what those matrices are, said by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from windlass.conformance.models import VOCABULARY, WIDTH, batch

ROWS = 24
Split = Callable[[Tensor], list[Tensor]]


class _Block(nn.Module):
    """q|k|v in one weight, grouped queries in another, gate|up in a third."""

    matrix_views: ClassVar = {"grouped.weight": (8, 4, 4)}

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.joint = nn.Linear(WIDTH, 3 * WIDTH)
        self.grouped = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_up = nn.Linear(WIDTH, 48)
        self.down = nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        query, key, value = self.joint(h).chunk(3, -1)
        x = x + torch.tanh(query * key) * value
        queries, keys, values = self.grouped(h).split((8, 4, 4), -1)
        mixed = torch.tanh(queries.unflatten(-1, (2, 4)) * keys.unsqueeze(-2)) + values.unsqueeze(-2)
        x = x + torch.cat((mixed.flatten(-2), queries), -1)
        gate, up = self.gate_up(h).chunk(2, -1)
        result: Tensor = x + self.down(F.silu(gate) * up)
        return result


class _Model(nn.Module):
    """Embedding, body, norm, head, defined in the order in which they are used: predictions count on that."""

    norm: nn.LayerNorm
    head: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.add_body()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def add_body(self) -> None:
        """What lies between embedding and norm."""

    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        return x

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        logits = self.head(self.norm(self.body(self.embedding(ids), ids)))
        return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


class Fused(_Model):
    """Tied head, a frozen matrix, one without gradients, and a block that is used for rows of odd length only."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embedding.weight

    def add_body(self) -> None:
        self.blocks = nn.ModuleList(_Block() for _ in range(3))
        self.blocks[1].down.requires_grad_(False)
        self.spare = nn.Linear(5, 9)

    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        x = self.blocks[1](self.blocks[0](x))
        return self.blocks[2](x) if self.needs_last(ids) else x

    def needs_last(self, ids: Tensor) -> bool:
        return ids.shape[1] % 2 == 1


class Branching(Fused):
    """The last block is used by the ranks whose own rows say so."""

    def needs_last(self, ids: Tensor) -> bool:
        return int(ids[0, 0]) % 2 == 1


class Sundry(_Model):
    """A convolution, and matrices in units of their own, so that shards cut them; of those of 3 and of 7 rows most
    ranks hold nothing."""

    def add_body(self) -> None:
        self.conv = nn.Conv1d(WIDTH, 12, 3, padding=1)
        self.wide = nn.Linear(12, 40)
        self.fold = nn.Linear(40, 24)
        self.three = nn.Linear(24, 3, bias=False)
        self.seven = nn.Linear(3, 7)
        self.back = nn.Linear(7, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 24)
        self.down = nn.Linear(24, WIDTH)

    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        h = self.fold(torch.tanh(self.wide(torch.tanh(self.conv(x.mT).mT))))
        x = x + self.back(torch.tanh(self.seven(self.three(h))))
        result: Tensor = x + self.down(torch.tanh(self.up(x)))
        return result


class _Experts(nn.Module):
    """Stacks of matrices, all used by every token."""

    def __init__(self, count: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, inner, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(count, WIDTH, inner) / 4)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        hidden = torch.tanh(torch.einsum("bsw,eiw->bsei", x, self.up))
        return torch.einsum("bsei,ewi,bse->bsw", hidden, self.down, weights)


class _Mixture(nn.Module):
    def __init__(self, count: int, inner: int) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, count, bias=False)
        self.experts = _Experts(count, inner)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.experts(x, torch.softmax(self.router(x), -1))
        return result


class Mixed(_Model):
    """Stacks of four, three and five experts; those of three have a size that no cut between elements fits."""

    def add_body(self) -> None:
        self.blocks = nn.ModuleList((_Mixture(4, 8), _Mixture(3, 5), _Mixture(5, 4)))

    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class WholeNumbers(nn.Module):
    """Its gradients are sums of whole numbers, divided by powers of two: the same however they are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, 8) for width in (40, 9, 33))

    def forward(self, x: Tensor, signs: Tensor) -> Tensor:
        sums = [(block(x[:, : block.in_features]) * signs).sum(1) for block in self.blocks]
        return torch.stack(sums).sum(0).mean() / 4

    @staticmethod
    def batch_of(step: int) -> tuple[Tensor, Tensor]:
        """Rows of -1, 0 and 1."""
        generator = torch.Generator().manual_seed(step)
        drawn = torch.randint(-1, 2, (16, 48), generator=generator).float()
        return drawn[:, :40], drawn[:, 40:]


class Given(nn.Module):
    """Its gradients are the matrices that it is given, whatever its weights."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        terms = [(block.get_parameter("weight") * one).sum() for block, one in zip(self.blocks, gradients, strict=True)]
        return torch.stack(terms).sum()


def _rows(*sizes: int) -> Split:
    return lambda whole: list(whole.split(sizes))


def _flatten(whole: Tensor) -> list[Tensor]:
    return [whole.view(whole.shape[0], -1)]


def _stack(whole: Tensor) -> list[Tensor]:
    return list(whole)


MODELS: Mapping[str, type[_Model]] = {one.__name__: one for one in (Fused, Branching, Sundry, Mixed)}
VIEWS: Mapping[str, Mapping[str, int | tuple[int, ...]]] = {
    name: {"*.joint.weight": 3, "*.gate_up.weight": (24, 24)}  # the block declares the grouped one
    for name in ("Fused", "Branching")
}
_SPLITS: Mapping[str, Split] = {
    "joint.weight": _rows(WIDTH, WIDTH, WIDTH),
    "grouped.weight": _rows(8, 4, 4),
    "gate_up.weight": _rows(24, 24),
    "down.weight": _flatten,
    "spare.weight": _flatten,
    "conv.weight": _flatten,
    "wide.weight": _flatten,
    "fold.weight": _flatten,
    "up.weight": _flatten,
    "three.weight": _flatten,
    "seven.weight": _flatten,
    "back.weight": _flatten,
    "experts.up": _stack,
    "experts.down": _stack,
}


def build(name: str) -> nn.Module:
    """The same weights every time. Vectors do not start at zero, where a relative distance measures noise."""
    torch.manual_seed(0)
    module = MODELS[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def find_split(name: str) -> Split | None:
    """How the parameter of that name is made of matrices; None: it is none of Muon's."""
    return next((split for ending, split in _SPLITS.items() if name.endswith(ending)), None)


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """(ids, targets), each [ROWS, length]; the length is odd in every other step."""
    return batch(step, ROWS, 5 + step % 2)


def muon_names(module: nn.Module) -> list[str]:
    """What Muon must update, and nothing else."""
    return [name for name, one in module.named_parameters() if one.requires_grad and find_split(name) is not None]
