"""The lower triangle of a symmetric matrix from its upper one, by transposing tiles in registers; compiled by numba."""

from __future__ import annotations

from typing import Any, Final

import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

_TILE: Final = 16  # rows and columns


def _tile_copier(element: Any) -> Any:
    """`copy(destination, source, bytes)`: a tile transposed, whose rows lie `bytes` apart in both places."""
    vector = ir.VectorType(element, _TILE)
    halves = [
        ir.Constant(ir.VectorType(ir.IntType(32), _TILE), [i // 2 + first + _TILE * (i % 2) for i in range(_TILE)])
        for first in (0, _TILE // 2)
    ]

    @intrinsic
    def copy(_typing: Any, _destination: Any, _source: Any, _stride: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            destination, source, stride = arguments

            def row_at(address: Any, row: int) -> Any:
                offset = builder.mul(stride, ir.Constant(ir.IntType(64), row))
                return builder.inttoptr(builder.add(address, offset), vector.as_pointer())

            align = element.width // 8 if isinstance(element, ir.IntType) else 4
            rows = [builder.load(row_at(source, row), align=align) for row in range(_TILE)]
            for _ in range(4):  # each round shuffles like a deck of cards: four of them transpose sixteen rows
                rows = [
                    builder.shuffle_vector(rows[row // 2], rows[row // 2 + _TILE // 2], halves[row % 2])
                    for row in range(_TILE)
                ]
            for row in range(_TILE):
                builder.store(rows[row], row_at(destination, row), align=align)
            return None

        return types.void(types.int64, types.int64, types.int64), generate

    return copy


_copy_halves, _copy_floats = _tile_copier(ir.IntType(16)), _tile_copier(ir.FloatType())


@njit(types.void(types.uint16[:, ::1], types.int64), nogil=True, cache=True)
def _mirror_halves(elements: Any, height: int) -> None:
    rows, stride = elements.shape[0], elements.shape[0] * 2
    for top in range(0, rows, _TILE):
        for left in range((top // height + 1) * height, rows, _TILE):
            if left + _TILE <= rows:
                base = elements.ctypes.data
                _copy_halves(base + left * stride + top * 2, base + top * stride + left * 2, stride)
            else:
                for j in range(left, rows):
                    for i in range(top, top + _TILE):
                        elements[j, i] = elements[i, j]


@njit(types.void(types.float32[:, ::1], types.int64), nogil=True, cache=True)
def _mirror_floats(elements: Any, height: int) -> None:
    rows, stride = elements.shape[0], elements.shape[0] * 4
    for top in range(0, rows, _TILE):
        for left in range((top // height + 1) * height, rows, _TILE):
            if left + _TILE <= rows:
                base = elements.ctypes.data
                _copy_floats(base + left * stride + top * 4, base + top * stride + left * 4, stride)
            else:
                for j in range(left, rows):
                    for i in range(top, top + _TILE):
                        elements[j, i] = elements[i, j]


def mirror(matrix: Tensor, height: int) -> None:
    """Make a contiguous square matrix symmetric that is known on and above its diagonal blocks [height, height]; the
    height is a multiple of 16."""
    if matrix.dtype == torch.float32:
        _mirror_floats(matrix.numpy(), height)
    else:
        _mirror_halves(matrix.view(torch.uint16).numpy(), height)
