"""Which matrices a parameter holds: what Muon orthogonalises, each for itself.

[Note: views] A weight is one matrix, a convolution's kernel [out, in, ...] is [out, in * ...], a stack of experts
[E, n, m] is E matrices. Row splits divide each of them (q|k|v, gate|up, heads), before anything else is decided: the
scale of an update follows from the part's own shape. All of them are runs of elements of the flat parameter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from windlass.core.specs import ParamSpec, Role

MUON_ROLES = frozenset({Role.MATRIX, Role.CONV, Role.EXPERTS})
"""What Muon is for, unless an override says otherwise."""


@dataclass(frozen=True)
class MatrixRun:
    """Equal matrices of one parameter at equal distances, in elements of the flat parameter."""

    start: int
    rows: int
    columns: int
    count: int
    stride: int

    @property
    def numel(self) -> int:
        """Of one matrix."""
        return self.rows * self.columns


def find_matrices(spec: ParamSpec) -> tuple[MatrixRun, ...]:
    """The matrices of a parameter, equal neighbours in one run. Raises ValueError for a shape that is no matrix, and
    for row splits that do not add up."""
    stack, rows, columns = matrix_shape(spec)
    splits = spec.views or (rows,)
    if sum(splits) != rows or min(splits) < 1:
        raise ValueError(
            f"parameter {spec.name!r} of shape {spec.shape} has {rows} rows, which row splits of "
            f"{' + '.join(map(str, splits))} = {sum(splits)} do not divide; correct its entry in muon.views, or the "
            "module that declares it"
        )
    whole = rows * columns
    runs: list[MatrixRun] = []
    position = 0
    for size in splits:
        last = runs[-1] if runs else None
        if stack == 1 and last is not None and last.rows == size:
            runs[-1] = MatrixRun(last.start, size, columns, last.count + 1, size * columns)
        elif stack > 1:
            runs.append(MatrixRun(position * columns, size, columns, stack, whole))
        else:
            runs.append(MatrixRun(position * columns, size, columns, 1, size * columns))
        position += size
    return tuple(run for run in runs if run.numel)


def matrix_shape(spec: ParamSpec) -> tuple[int, int, int]:
    """(matrices, rows, columns) before row splits."""
    if len(spec.shape) < 2:
        raise ValueError(
            f"parameter {spec.name!r} of shape {spec.shape} is not a matrix, so Muon cannot train it; leave it to "
            "AdamW, by its entry in muon.roles or without its use_muon"
        )
    if spec.role is Role.EXPERTS:
        stack, rows, columns = spec.shape[0], spec.shape[1], math.prod(spec.shape[2:])
        return stack, rows, columns
    return 1, spec.shape[0], math.prod(spec.shape[1:])
