"""What collectives carry in the tests, where it lies on the device, and what plain arithmetic on the host says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator, ReduceOp

FLOATING: Final = ("float32", "bfloat16", "float16")
INTEGERS: Final = ("uint8", "int32", "int64")
MOVED: Final = (*FLOATING, "float64", "integers")
"""What moves without being reduced. The integers, which every backend has to move, go together."""
SIZES: Final = (0, 1, 7, 1025, 40000)
"""Elements of a rank's part: nothing, one, odd ones, and one that no mailbox holds."""
PLACINGS: Final = ("whole", "slice", "shared whole", "shared slice")

_MARGINS: Final = (3, 5)  # elements before and after a slice; odd, so that a slice is aligned to its elements only


def dtype_needs(dtype: str, *more: str) -> tuple[str, ...]:
    """What a test needs to use one of `MOVED`: nothing for the integers."""
    own = {"integers": (), "float64": ("float64",)}.get(dtype, (f"dtypes:{dtype}",))
    return (*own, *more)


def require_dtype(accelerator: Accelerator, name: str) -> None:
    """Raise what the device raises for one of `MOVED`, here and not on ranks that would have to be started again."""
    for dtype in to_dtypes(name):
        accelerator.memory.release(accelerator.memory.empty((1,), dtype))


def to_dtypes(name: str) -> tuple[torch.dtype, ...]:
    """The torch dtypes that one of `MOVED` stands for."""
    return tuple(to_dtype(one) for one in (INTEGERS if name == "integers" else (name,)))


def to_dtype(name: str) -> torch.dtype:
    """The torch dtype of this name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def one_program(accelerator: Accelerator) -> bool:
    """Whether every rank must run the same program: then no slice, split or constant may depend on the rank."""
    return accelerator.capabilities.uniform_program


def draw(rank: int, count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of a rank that every rank can draw. Every other one is negative on all ranks, if the dtype can be."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        return torch.randint(limits.min, limits.max, (count,), generator=generator, dtype=dtype, device="cpu")
    scales = torch.exp2(torch.randint(-6, 7, (count,), generator=generator, device="cpu").float())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.randn(count, generator=generator, dtype=wide, device="cpu") * scales
    values[::2] = -values[::2].abs() - 0.015625
    return values.to(dtype)


def part(values: Tensor, index: int, count: int) -> Tensor:
    """Part `index` of `count` equal ones."""
    size = values.numel() // count
    return values[index * size : (index + 1) * size]


@dataclass(frozen=True)
class Placed:
    """A vector on the device, alone in an allocation or inside a larger one whose other elements must not change."""

    accelerator: Accelerator
    allocation: Tensor
    start: int
    length: int

    @property
    def tensor(self) -> Tensor:
        """The vector. A slice is cut anew for each use, since it may not be kept over a boundary."""
        if self.length == self.allocation.numel():
            return self.allocation
        return self.allocation[self.start : self.start + self.length]

    def read(self) -> Tensor:
        """The vector on the host, once the elements around it have been found untouched."""
        everything = self.accelerator.to_host(self.allocation)
        inside = everything[self.start : self.start + self.length]
        around = torch.cat([everything[: self.start], everything[self.start + self.length :]])
        changed = int((around != untouched(around.dtype)).sum())
        assert not changed, f"{changed} elements around the tensor were overwritten; is its offset respected?"
        return inside

    def expect(self, wanted: Tensor, *what: object) -> None:
        """Compare with values on the host, to the bit."""
        got = self.read()
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted), f"{_describe(what)}: {_first_difference(got, wanted)}"

    def release(self) -> None:
        self.accelerator.memory.release(self.allocation)


def place(accelerator: Accelerator, values: Tensor, placing: str = "whole", *, room: int | None = None) -> Placed:
    """Bring values to the device, in one of `PLACINGS`.

    `room` is the number of elements to allocate where it differs from the values': a shared allocation must be equal
    on all ranks.
    """
    before, after = _MARGINS if placing.endswith("slice") else (0, 0)
    room = max(values.numel(), room or 0)
    shared = accelerator.collectives.world if placing.startswith("shared") else None
    allocation = accelerator.memory.empty((before + room + after,), values.dtype, tag=placing, shared=shared)
    host = torch.full((before + room + after,), untouched(values.dtype), dtype=values.dtype, device="cpu")
    host[before : before + values.numel()] = values
    allocation.copy_(host)
    return Placed(accelerator, allocation, before, values.numel())


def blank(accelerator: Accelerator, count: int, dtype: torch.dtype, placing: str = "whole") -> Placed:
    """Memory for an output, full of a value that no floating result has."""
    return place(accelerator, torch.full((count,), untouched(dtype), dtype=dtype, device="cpu"), placing)


def untouched(dtype: torch.dtype) -> int:
    """A value that is exact in every dtype, and never drawn if it floats."""
    return -16384 if dtype.is_floating_point else 111


def check_reduced(got: Tensor, terms: Sequence[Tensor], op: ReduceOp, *what: object) -> None:
    """Compare a reduction on the host with its terms, one per rank: whatever the order of additions, a sum is close.

    n additions in the precision of the result err by at most n units of roundoff of the sum of magnitudes.
    """
    wide = torch.stack([term.double() for term in terms])
    if op == "max":
        wanted = wide.amax(0).to(got.dtype)
        assert torch.equal(got, wanted), f"{_describe(what)}: {_first_difference(got, wanted)}"
        return
    roundings = len(terms) if len(terms) > 1 else 0
    bound = wide.abs().sum(0) * (roundings * torch.finfo(got.dtype).eps / 2)
    error = (got.double() - wide.sum(0)).abs()
    good = error <= bound
    if not bool(good.all()):
        at = int((~good).nonzero()[0])
        raise AssertionError(
            f"{_describe(what)}: element {at} of {got.numel()} is {got[at].item()!r}, the sum of "
            f"{wide[:, at].tolist()} give or take {bound[at].item():.3g}"
        )


def add_in_rank_order(terms: Sequence[Tensor]) -> Tensor:
    """The fp32 sum of one term per rank, added one rank after another."""
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term.float()
    return total


def _describe(what: Sequence[object]) -> str:
    return ", ".join(map(str, what)) or "values"


def _first_difference(got: Tensor, wanted: Tensor) -> str:
    if got.shape != wanted.shape:
        return f"got shape {tuple(got.shape)} where {tuple(wanted.shape)} is wanted"
    different = (got != wanted).nonzero().flatten()
    at = int(different[0])
    return (
        f"{different.numel()} of {got.numel()} elements differ, the first at {at}: got {got[at].item()!r} where "
        f"{wanted[at].item()!r} is wanted"
    )
