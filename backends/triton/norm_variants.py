"""What the programs of the norms are compiled with, for each shape and combination of dtypes."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch

from windlass.backends.triton.launch import TYPE_NAMES, Variant
from windlass.backends.triton.norm_rows import (
    add_partials,
    differentiate,
    differentiate_long,
    normalize,
    normalize_long,
    sum_long,
)

LONGEST: Final = 8192
"""Elements of a row that registers hold; what is longer goes through in blocks of as many."""
SHORTEST: Final = 128
TILE: Final = 1024
"""Elements of a program at least: of so many short rows as that makes."""
PARTIALS: Final = 2**20
"""Elements of the partial sums of one vector of gradients, 4 MiB: so many programs add rows up as that makes."""
PROGRAMS: Final = 2048
"""That add up rows, at most: they fill 132 multiprocessors, and each leaves a sum that must be added up as well."""
COLUMNS: Final = 32
STEP: Final = 64
"""Columns of partial sums that one program adds up, so many rows of them at a time."""


def _make_variant(
    name: str, function: Any, vectors: dict[str, str], numbers: dict[str, str], constants: dict[str, Any], warps: int
) -> Variant:
    """A program whose absent vectors are constants, and whose rows are multiples of 16 elements when it is compiled
    ahead of time; Triton itself sees what they are when it is launched."""
    absent = dict.fromkeys((vector for vector, kind in vectors.items() if kind == "constexpr"), None)
    constants = absent | constants
    signature = vectors | numbers | dict.fromkeys(constants, "constexpr")
    kinds = [kind.removeprefix("*") for kind in vectors.values() if kind != "constexpr"]
    settings = [f"{key} {value}" for key, value in constants.items() if key not in absent]
    return Variant(
        name=f"{name} of {', '.join(kinds + settings)}",
        function=function,
        signature=signature,
        constants=constants,
        num_warps=warps,
        aligned=tuple(key for key in signature if key == "size" or signature[key].startswith("*")),
    )


def _pointer(dtype: torch.dtype | None) -> str:
    return "constexpr" if dtype is None else f"*{TYPE_NAMES[dtype]}"


def _rows(block: int) -> dict[str, int]:
    return {"ROWS": max(1, TILE // block), "BLOCK": block}


@cache
def make_forward(
    dtype: torch.dtype, weight: torch.dtype | None, bias: torch.dtype | None, centred: bool, block: int, *, long: bool
) -> Variant:
    """The forward program for these dtypes, for rows of up to `block` elements, or longer ones in such blocks."""
    vectors = {
        "output": _pointer(dtype),
        "mean": "*fp32" if centred else "constexpr",
        "rstd": "*fp32",
        "input": _pointer(dtype),
        "weight": _pointer(weight),
        "bias": _pointer(bias),
    }
    numbers = {"size": "i32", "count": "fp32", "eps": "fp32"}
    if long:
        constants = {"CENTRED": centred, "BLOCK": block}
        return _make_variant("normalize_long", normalize_long, vectors, numbers, constants, 16)
    constants = {"CENTRED": centred, **_rows(block)}
    return _make_variant(
        "normalize", normalize, vectors, {"tokens": "i32", **numbers}, constants, max(block, TILE) // 512
    )


@cache
def make_backward(dtype: torch.dtype, weight: torch.dtype | None, bias: bool, centred: bool, block: int) -> Variant:
    """The backward program for rows of up to `block` elements."""
    vectors = {
        "input_gradient": _pointer(dtype),
        "weight_sums": "constexpr" if weight is None else "*fp32",
        "bias_sums": "*fp32" if bias else "constexpr",
        "output_gradient": _pointer(dtype),
        "input": _pointer(dtype),
        "weight": _pointer(weight),
        "mean": "*fp32" if centred else "constexpr",
        "rstd": "*fp32",
    }
    numbers = {"tokens": "i32", "size": "i32", "count": "fp32"}
    constants = {"CENTRED": centred, **_rows(block)}
    return _make_variant("differentiate", differentiate, vectors, numbers, constants, min(max(block, TILE) // 256, 16))


@cache
def make_long_backward(dtype: torch.dtype, weight: torch.dtype | None, centred: bool) -> Variant:
    """The program for the gradients of longer rows."""
    vectors = {
        "input_gradient": _pointer(dtype),
        "output_gradient": _pointer(dtype),
        "input": _pointer(dtype),
        "weight": _pointer(weight),
        "mean": "*fp32" if centred else "constexpr",
        "rstd": "*fp32",
    }
    constants = {"CENTRED": centred, "BLOCK": LONGEST}
    numbers = {"size": "i32", "count": "fp32"}
    return _make_variant("differentiate_long", differentiate_long, vectors, numbers, constants, 16)


@cache
def make_long_sums(dtype: torch.dtype, weight: bool, bias: bool, centred: bool) -> Variant:
    """The program for the gradients of weight and bias of longer rows."""
    vectors = {
        "weight_sums": "*fp32" if weight else "constexpr",
        "bias_sums": "*fp32" if bias else "constexpr",
        "output_gradient": _pointer(dtype),
        "input": _pointer(dtype),
        "mean": "*fp32" if centred else "constexpr",
        "rstd": "*fp32",
    }
    constants = {"CENTRED": centred, "BLOCK": TILE}
    return _make_variant("sum_long", sum_long, vectors, {"tokens": "i32", "size": "i32"}, constants, 4)


@cache
def make_addition(dtype: torch.dtype) -> Variant:
    """The program that adds up what the programs of a backward pass came to."""
    vectors = {"result": _pointer(dtype), "partials": "*fp32"}
    constants = {"ROWS": STEP, "COLUMNS": COLUMNS}
    return _make_variant("add_partials", add_partials, vectors, {"programs": "i32", "size": "i32"}, constants, 4)
