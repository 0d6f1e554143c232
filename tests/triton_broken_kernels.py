"""Kernels that cannot run on a GPU, each for a reason of its own, and one that can: for tests/triton_kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from windlass.backends.triton.launch import Variant


@triton.jit
def double(output: tl.tensor, values: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.arange(0, BLOCK)
    tl.store(output + at, 2 * tl.load(values + at))


@triton.jit
def multiply(output: tl.tensor, values: tl.tensor, BLOCK: tl.constexpr) -> None:
    """A product of two blocks, which meet in shared memory."""
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    left, right = tl.load(values + at), tl.load(values + BLOCK * BLOCK + at)
    tl.store(output + at, tl.dot(left, right))


@triton.jit
def hold(output: tl.tensor, values: tl.tensor, BLOCK: tl.constexpr) -> None:
    """All values are needed until their sum is known: more than there are registers."""
    at = tl.arange(0, BLOCK)
    held = tl.load(values + at)
    tl.store(output + at, held * tl.sum(held))


POINTERS = {"output": "*fp32", "values": "*fp32"}
VARIANTS = (
    Variant("fits", double, POINTERS, {"BLOCK": 1024}, num_warps=4, aligned=("output", "values")),
    Variant("spills", hold, POINTERS, {"BLOCK": 16384}, num_warps=1),
    Variant("too wide", multiply, {**POINTERS, "values": "*fp16"}, {"BLOCK": 256}, num_warps=8),
    Variant("stores to a number", double, {**POINTERS, "output": "i32"}, {"BLOCK": 1024}, num_warps=4),
    Variant("forgets an argument", double, {"output": "*fp32"}, {"BLOCK": 1024}, num_warps=4),
)
