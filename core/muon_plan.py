"""What a plan says about Muon: which matrices there are, who orthogonalises them, and what travels when. Plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from windlass.accelerator.polar import Form
from windlass.core.muon import MuonRules
from windlass.core.qk_clip_plan import QKClipPlan
from windlass.core.specs import dtype_from_name

EVERYONE = -1
"""The owner of a matrix that every rank orthogonalises for itself."""


@dataclass(frozen=True)
class Matrices:
    """Equal matrices of one parameter, at equal distances in its region."""

    name: str  # of the parameter
    region: str
    start: int  # of the first, in elements of the whole region
    rows: int
    columns: int
    stride: int
    owners: tuple[int, ...]  # the rank that orthogonalises each

    @property
    def numel(self) -> int:
        """Of one matrix."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Matrix:
    """One of them. `index` numbers the matrices of a plan."""

    index: int
    name: str
    region: str
    start: int
    rows: int
    columns: int
    owner: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def stop(self) -> int:
        return self.start + self.numel


@dataclass(frozen=True)
class MuonPrediction:
    """What Muon costs beyond AdamW, by rank where ranks differ. Bytes are received from other ranks, per step."""

    flops: tuple[int, ...]  # of Newton-Schulz
    inward: tuple[int, ...]  # bytes of update inputs
    outward: tuple[int, ...]  # bytes of directions
    calls: int  # of collectives
    wave_bytes: int  # the most that one wave's matrices take on a rank
    buffer_bytes: int = 0  # the most that a rank has in memory for what travels; 0: not known

    @property
    def balance(self) -> float:
        """The busiest rank's share of Newton-Schulz over the mean; 1 is even."""
        total = sum(self.flops)
        return max(self.flops) * len(self.flops) / total if total else 1.0


@dataclass(frozen=True)
class MuonPlan:
    """Matrices that their owner holds whole are local: it orthogonalises them where they lie. The others travel in
    waves: wave by wave, update inputs go to the owners and directions come back."""

    rules: MuonRules
    forms: Mapping[str, Form]  # "rows x columns" -> form
    matrices: tuple[Matrices, ...]
    waves: tuple[tuple[int, ...], ...]  # matrix indices; no matrix of a wave is local
    batch_bytes: int  # of the matrices that one kernel call orthogonalises
    prediction: MuonPrediction
    qk_clip: QKClipPlan | None = None

    @cached_property
    def each(self) -> tuple[Matrix, ...]:
        """Every matrix by itself, in order of index."""
        return number_matrices(self.matrices)

    @cached_property
    def local(self) -> tuple[int, ...]:
        """Indices of the matrices that do not travel."""
        travelling = {index for wave in self.waves for index in wave}
        return tuple(index for index in range(self.count) if index not in travelling)

    @property
    def count(self) -> int:
        """Of matrices: Newton-Schulz runs this often per optimizer step, over all ranks."""
        return sum(len(many.owners) for many in self.matrices)

    def form_of(self, rows: int, columns: int) -> Form:
        """How matrices of this shape are orthogonalised."""
        return self.forms[shape_key(rows, columns)]

    def batch_size(self, numel: int) -> int:
        """How many matrices of `numel` elements one kernel call orthogonalises."""
        return max(1, self.batch_bytes // (numel * dtype_from_name(self.rules.direction_dtype).itemsize))


def number_matrices(matrices: Iterable[Matrices]) -> tuple[Matrix, ...]:
    """Every matrix by itself, in order."""
    singles: list[Matrix] = []
    for many in matrices:
        for place, owner in enumerate(many.owners):
            start = many.start + place * many.stride
            singles.append(Matrix(len(singles), many.name, many.region, start, many.rows, many.columns, owner))
    return tuple(singles)


def shape_key(rows: int, columns: int) -> str:
    """ "512 x 2048": the name of a shape in JSON."""
    return f"{rows} x {columns}"


def floor_bytes(numel: int, ranks: int, itemsize: int) -> float:
    """Bytes that a rank must receive per step, both ways together, if every rank holds an equal part of every matrix:
    2 numel itemsize (N - 1) / N^2, which in 16 bits is 4 numel (N - 1) / N^2."""
    return 2 * numel * itemsize * (ranks - 1) / ranks**2 if ranks else math.nan
