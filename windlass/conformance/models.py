"""Small models for the training tests, each with the corner that it is named for. No bias feeds a softmax key and
nothing has a gradient that is zero in theory: AdamW turns rounding noise there into steps of full size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH = 13, 16


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
        return result


class Network(nn.Module):
    """Embedding, blocks, norm, head: forward(ids, targets) -> mean loss."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x

    def logits(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.body(self.embedding(ids), ids)))
        return result

    def forward(self, ids: Tensor, targets: Tensor) -> Any:
        logits = self.logits(ids)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide.flatten(0, -2), targets.flatten())


class Tied(Network):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.embedding.weight


class CheckpointedReentrant(Network):
    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=True)
        return x


class Checkpointed(Network):
    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class UnusedEverywhere(Network):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 7)
        self.blocks.insert(1, _Skipped(Block()))


class _Skipped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x


class Branching(Network):
    """A block is used when the first token of the batch says so: on some ranks, in some steps, in another order."""

    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        first = int(ids.flatten()[0])
        order = [(0, 1, 2, 3), (0, 3), (2, 1), (3,)][first % 4]
        for index in order:
            x = self.blocks[index](x)
        return x


class CalledOften(Network):
    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        for _ in range(3):
            for block in (self.blocks[0], self.blocks[2]):
                x = block(x)
        return self.blocks[3](self.blocks[1](x))  # type: ignore[no-any-return]


class Frozen(Network):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].requires_grad_(False)
        self.embedding.requires_grad_(False)


class Adapted(nn.Module):
    """LoRA: frozen matrices with small trained ones beside them."""

    class _Linear(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            self.a = nn.Linear(base.in_features, 3, bias=False)
            self.b = nn.Linear(3, base.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.base(x) + self.b(self.a(x))
            return result

    def __init__(self) -> None:
        super().__init__()
        self.inner = Network()
        self.inner.requires_grad_(False)
        for block in self.inner.blocks:
            assert isinstance(block, Block)
            block.up = Adapted._Linear(block.up)  # type: ignore[assignment]

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        result: Tensor = self.inner(ids, targets)
        return result


class TinyPieces(Network):
    """Parameters of 0, 1, 3 and 7 elements, directly on the root; more ranks than rows."""

    def __init__(self) -> None:
        super().__init__(layers=2)
        self.none = nn.Parameter(torch.zeros(0))
        self.one = nn.Parameter(torch.ones(1))
        self.three = nn.Parameter(torch.randn(3))
        self.seven = nn.Parameter(torch.randn(7, 1))

    def logits(self, ids: Tensor) -> Tensor:
        x = super().logits(ids) * self.one
        x = x + F.pad(self.three, (0, VOCABULARY - 3)) + self.none.sum()
        return x + F.pad(torch.tanh(self.seven[:, 0]), (VOCABULARY - 7, 0))


class OneParameter(nn.Module):
    """More ranks than parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, VOCABULARY))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return ((self.weight[ids] - targets / VOCABULARY) ** 2).mean()


class ReadsAnother(Network):
    """One block multiplies with another block's weight; the loss adds a penalty on a third's."""

    class _Reader(nn.Module):
        def __init__(self, other: Block) -> None:
            super().__init__()
            self.others = (other,)  # a tuple: not registered as a child
            self.scale = nn.Parameter(torch.full((1,), 0.1))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = x + self.scale * torch.tanh(F.linear(x, self.others[0].down.weight.t()[:WIDTH, :WIDTH]))
            return result

    def __init__(self) -> None:
        super().__init__()
        self.blocks.append(self._Reader(self.blocks[0]))  # type: ignore[arg-type]

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = super().forward(ids, targets)
        return loss + 0.01 * self.blocks[2].up.weight.square().mean()  # type: ignore[union-attr, operator]


@dataclass
class Result:
    loss: Tensor
    note: str


class ReturnsDataclass(Network):
    def forward(self, ids: Tensor, targets: Tensor) -> Result:
        return Result(super().forward(ids, targets), "a dataclass")


class ReturnsDict(Network):
    def forward(self, ids: Tensor, targets: Tensor) -> dict[str, Any]:
        return {"loss": super().forward(ids, targets), "sizes": [ids.shape[0]]}


class ReturnsTuple(Network):
    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, None]:
        return super().forward(ids, targets), None


class MixedDtypes(Network):
    """A bf16 block and an integer buffer in an fp32 model."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].to(torch.bfloat16)
        self.register_buffer("count", torch.arange(5))

    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x.to(torch.bfloat16)).float() if index == 2 else block(x)
        return x


class GivesItsWeight(Network):
    """A module that returns a view of its parameter, used after other units have been."""

    class _Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(1, WIDTH))

        def forward(self, rows: int) -> Tensor:
            return self.queries.expand(rows, WIDTH)

    def __init__(self) -> None:
        super().__init__()
        self.queries = self._Queries()

    def logits(self, ids: Tensor) -> Tensor:
        queries = self.queries(5)
        x = self.body(self.embedding(ids), ids)
        result: Tensor = self.head(self.norm(x * queries[: x.shape[1]]))
        return result


class OneBlockInFourPlaces(Network):
    """The same module instance again and again, under four names."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block()] * 4)


class InPlaceFirst(Network):
    """Every block begins by overwriting its input."""

    class _Block(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh_(x)
            result: Tensor = x + self.down(torch.tanh(self.up(self.norm(x))))
            return result

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self._Block() for _ in range(6))


class OddBuffers(Network):
    """Complex, boolean and empty buffers, and state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rotation", torch.polar(torch.ones(WIDTH), torch.linspace(0, 1, WIDTH)))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("nothing", torch.zeros(0))

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 3}

    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        return super().body(x, ids) * self.rotation.real  # type: ignore[operator]


class Attention(Network):
    """torch's own MultiheadAttention, which reads the weight of a child without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, bias=False, batch_first=True)

    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        x = super().body(x, ids)
        result: Tensor = x + self.attention(x, x, x, need_weights=False)[0]
        return result


MODELS: dict[str, Callable[[], nn.Module]] = {
    one.__name__: one
    for one in (
        Network, Tied, Checkpointed, CheckpointedReentrant, UnusedEverywhere, Branching, CalledOften, Frozen,
        Adapted, TinyPieces, OneParameter, ReadsAnother, ReturnsDataclass, ReturnsDict, ReturnsTuple, MixedDtypes,
        Attention, GivesItsWeight, OneBlockInFourPlaces, InPlaceFirst, OddBuffers,
    )
}  # fmt: skip


def build(name: str, seed: int = 0) -> nn.Module:
    """The same weights for the same seed. Vectors do not start at zero, where a relative distance measures noise."""
    torch.manual_seed(seed)
    module = MODELS[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1 and parameter.numel() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def loss_of(output: Any) -> Tensor:
    """The loss, however the model returned it."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        return output["loss"]  # type: ignore[no-any-return]
    if isinstance(output, tuple):
        return output[0]  # type: ignore[no-any-return]
    return output.loss  # type: ignore[no-any-return]


def batch(step: int, rows: int = 48, length: int = 5) -> tuple[Tensor, Tensor]:
    """The global batch of one optimizer step: (ids, targets), each [rows, length]."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    return ids, (ids * 5 + 3) % VOCABULARY
