"""Products of matrices whose result is known to be symmetric: half of it is computed, and stored twice.

X X^T is symmetric, and so is A B for symmetric A and B that commute. Only tiles on and below the diagonal are
computed; each is also stored, transposed, as its mirror image. So the result is symmetric to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from windlass.accelerator.kernels import Kernel
from windlass.backends.triton.launch import TYPE_NAMES, Variant, interpreting, launch
from windlass.backends.triton.numbers import round_to, widen

KERNEL: Final = "symmetric_product"
PADDING: Final = 64
"""Sizes of the factors are multiples of it. Zeros beyond the end of a matrix change none of its products."""
GROUP: Final = 8  # rows of tiles that are worked on together, so that what they read stays in the cache


@triton.jit
def _triangle(place):  # type: ignore[no-untyped-def]
    """Row and column of an element of a lower triangle, counted row by row; exact below 2^31."""
    row = ((tl.sqrt_rn(8.0 * place.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row.to(tl.int64) * (row + 1) // 2 > place, row - 1, row)  # the root may be off by one in the end
    row = tl.where((row + 1).to(tl.int64) * (row + 2) // 2 <= place, row + 1, row)
    return row, place - (row.to(tl.int64) * (row + 1) // 2).to(tl.int32)


@triton.jit
def _tile(place, tiles, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column of the tile at a place: by groups of rows, and in a group column after column."""
    row, _ = _triangle(place)
    first = row // GROUP * GROUP
    height = tl.minimum(GROUP, tiles - first)
    inside = place - (first.to(tl.int64) * (first + 1) // 2).to(tl.int32)
    below, right = _triangle(tl.maximum(inside - first * height, 0))
    full = inside < first * height  # in columns left of the diagonal, where every row of the group has a tile
    return (
        tl.where(full, first + inside % height, first + below),
        tl.where(full, inside // height, first + right),
    )


@triton.jit
def _symmetric(  # type: ignore[no-untyped-def]
    left,  # [batch, rows, inner], each matrix by row_stride and inner_stride
    right,  # as left; it is read transposed
    added,  # [batch, rows, rows], contiguous, as the result; not read where not ADD
    out,
    alpha,
    beta,
    rows,
    inner,
    matrix_stride,
    row_stride,
    inner_stride,
    tiles,  # rows of tiles
    programs,  # tiles of a matrix
    ADD: tl.constexpr,
    INTERPRETED: tl.constexpr,  # inner once more for Triton's interpreter, else 0
    BLOCK: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out = alpha left right^T + beta added, where that is symmetric. One program makes one tile and its image."""
    program = tl.program_id(0)
    matrix = (program // programs).to(tl.int64)
    tile_row, tile_column = _tile(program % programs, tiles, GROUP)
    i = tile_row * BLOCK + tl.arange(0, BLOCK)
    j = tile_column * BLOCK + tl.arange(0, BLOCK)
    depth = tl.arange(0, BLOCK_INNER)

    # Rows beyond the end are others once more, which costs no mask in the loop; they are not stored.
    across = depth.to(tl.int64)[None, :] * inner_stride
    left += matrix * matrix_stride + (i % rows).to(tl.int64)[:, None] * row_stride + across
    right += matrix * matrix_stride + (j % rows).to(tl.int64)[:, None] * row_stride + across
    advance = tl.cast(inner_stride, tl.int64) * BLOCK_INNER
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for _ in range(0, inner if INTERPRETED == 0 else INTERPRETED, BLOCK_INNER):
        x = tl.load(left)
        y = tl.load(right)
        if INTERPRETED:  # it multiplies bf16 wrongly; products in fp32 are exact
            x = widen(x)
            y = widen(y)
        total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
        left += advance
        right += advance

    total *= alpha
    if tile_row == tile_column:  # this tile is its own image: what is above the diagonal comes from below
        total = tl.where(j[None, :] <= i[:, None], total, tl.trans(total))
    corner = matrix * rows * rows
    here = corner + i.to(tl.int64)[:, None] * rows + j[None, :]
    within = (i[:, None] < rows) & (j[None, :] < rows)
    if ADD:
        more = tl.load(added + here, mask=within, other=0.0)
        total += beta * (widen(more) if INTERPRETED else more.to(tl.float32))
    result = round_to(total, out.dtype.element_ty) if INTERPRETED else total.to(out.dtype.element_ty)
    tl.store(out + here, result, mask=within)
    image = corner + j.to(tl.int64)[:, None] * rows + i[None, :]
    tl.store(out + image, tl.trans(result), mask=(j[:, None] < rows) & (i[None, :] < rows))


def symmetric_product(
    left: Tensor,  # [b, n, k], contiguous or the transpose of contiguous [b, k, n]; n and k are multiples of PADDING
    right: Tensor,  # as left
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    added: Tensor | None = None,  # [b, n, n], contiguous and symmetric; only where left is contiguous
) -> Tensor:
    """alpha left right^T + beta added of each matrix, which must be symmetric by what the matrices are.

    All are of one dtype, fp32, bf16 or fp16, as is the result. Terms are added in fp32 and rounded once. Raises
    ValueError where shapes, dtypes or layouts do not fit.
    """
    by_rows = _check(left, right, added)
    batch, rows, inner = left.shape
    out = torch.empty((batch, rows, rows), dtype=left.dtype, device=left.device)
    if batch == 0:
        return out
    variant = _VARIANTS[left.dtype, by_rows, added is not None]
    if interpreting():  # an argument is a vector of one element there, which is no bound of a range
        variant = replace(variant, constants=variant.constants | {"INTERPRETED": inner})
    tiles = -(-rows // variant.constants["BLOCK"])
    programs = tiles * (tiles + 1) // 2
    launch(
        variant, (batch * programs,), left.device,
        left=left, right=right, added=out if added is None else added, out=out, alpha=float(alpha), beta=float(beta),
        rows=rows, inner=inner, matrix_stride=rows * inner, tiles=tiles, programs=programs,
        **({"row_stride": inner} if by_rows else {"inner_stride": rows}),
    )  # fmt: skip
    return out


def _check(left: Tensor, right: Tensor, added: Tensor | None) -> bool:
    """Whether the factors lie row by row; ValueError where the kernel cannot take them."""
    fits = left.dtype in _TILES and left.dim() == 3 and all(size and size % PADDING == 0 for size in left.shape[1:])
    by_rows = left.is_contiguous()
    if not (fits and (by_rows or left.mT.is_contiguous())):
        raise ValueError(
            f"kernel {KERNEL!r} got left as {_describe(left)}, wanted [b, n, k] of float32, bfloat16 or float16, or "
            f"the transpose of [b, k, n], contiguous and of sizes that {PADDING} divides; pad them with zeros"
        )
    if (right.shape, right.dtype, right.stride()) != (left.shape, left.dtype, left.stride()):
        raise ValueError(
            f"kernel {KERNEL!r} got right as {_describe(right)}, wanted it as left, {_describe(left)}; bring both into "
            f"one layout"
        )
    if added is None:
        return by_rows
    wanted = (left.shape[0], left.shape[1], left.shape[1])
    if not (by_rows and added.shape == wanted and added.dtype == left.dtype and added.is_contiguous()):
        raise ValueError(
            f"kernel {KERNEL!r} got added as {_describe(added)}, wanted it beside contiguous factors, contiguous and "
            f"{left.dtype}{list(wanted)}; add it afterwards"
        )
    return by_rows


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)} with strides {list(tensor.stride())}"


@dataclass(frozen=True)
class _Tile:
    """What one program works on."""

    block: int  # rows and columns of the result
    block_inner: int
    num_warps: int


# Three stages of 16 bits take 96 KiB: two blocks share a multiprocessor of Hopper, and one stores its tile while the
# other multiplies. A matrix of 4096 is 528 tiles, which is 2 times 264, the blocks of 132 multiprocessors.
_TILES: Final = {
    torch.float32: _Tile(64, 16, 4),
    torch.bfloat16: _Tile(128, 64, 8),
    torch.float16: _Tile(128, 64, 8),
}


_SHARED_REGISTERS: Final = 128
"""Of one thread, where two blocks of 8 warps share the 65,536 of a multiprocessor."""


def _make_variant(dtype: torch.dtype, *, by_rows: bool, add: bool) -> Variant:
    tile = _TILES[dtype]
    unit, stride = ("inner_stride", "row_stride") if by_rows else ("row_stride", "inner_stride")
    pointers = ("left", "right", "added", "out")
    sizes = ("rows", "inner", "matrix_stride", stride)
    return Variant(
        name=f"{TYPE_NAMES[dtype]} by {'rows' if by_rows else 'columns'}{', added' if add else ''}",
        function=_symmetric,
        signature=dict.fromkeys(pointers, f"*{TYPE_NAMES[dtype]}")
        | dict.fromkeys(("alpha", "beta"), "fp32")
        | dict.fromkeys((*sizes, "tiles", "programs"), "i32"),
        constants={
            unit: 1, "ADD": add, "INTERPRETED": 0, "BLOCK": tile.block, "BLOCK_INNER": tile.block_inner, "GROUP": GROUP
        },
        num_warps=tile.num_warps,
        fp_fusion=True,
        aligned=(*pointers, *sizes),
        # Left alone, what is added takes registers of which two blocks have not enough.
        max_registers=_SHARED_REGISTERS if add and tile.num_warps == 8 else None,
    )  # fmt: skip


_VARIANTS: Final = {
    (dtype, by_rows, add): _make_variant(dtype, by_rows=by_rows, add=add)
    for dtype in _TILES
    for by_rows, add in ((True, False), (True, True), (False, False))
}
KERNELS: Final[tuple[Kernel, ...]] = ()  # it is a part of others, with no schema of its own
VARIANTS: Final[tuple[Variant, ...]] = tuple(_VARIANTS.values())
