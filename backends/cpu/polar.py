"""Orthogonal polar factors on the processor: one matrix after the other, as few and as large products as its shape
allows.

[Note: stretches] A stretch makes the Gram matrix G = X X^T once, takes one or more steps on it, and multiplies X by the
product P of their Q = a I + b G + c G^2. The standard form has stretches of one step. Two steps on one Gram matrix
need, of a matrix four times as long as high, seven tenths of the operations; their errors in bfloat16 stay below a
quarter of what the schema allows, on spectra that fall and on those with a gap, where single steps need a seventh.
Three are not safe: what rounding does to G grows by a^2 a step where X is small.

All but X is symmetric, so one triangle is enough to know it: `Products.multiply_symmetric`. The a of Q is added to its
diagonal, which saves a pass over X.
"""

from __future__ import annotations

import itertools
import math
from typing import Final

import torch
from torch import Tensor

from windlass.accelerator.kernels import Kernel
from windlass.accelerator.polar import Coefficients, plan_restarts
from windlass.accelerator.reference.polar import require_gram_dtype
from windlass.backends.cpu.polar_passes import KINDS, normalize
from windlass.backends.cpu.products import Products, choose_products

IMPLEMENTATION: Final = "strips"
_LEAST: Final = 256  # rows from which on the standard form joins steps
_LONG: Final = 1.5  # times as long as high: from there on two steps on one Gram matrix need fewer operations


def polar(stack: Tensor, coefficients: Coefficients, *, product_dtype: torch.dtype = torch.float32) -> Tensor:
    """The polar factor of each matrix of a stack [b, n, m]; see `reference.polar`."""
    _require_stack("polar", stack)
    starts = plan_stretches(stack.shape[1], stack.shape[2], coefficients, product_dtype)
    return _run(stack, coefficients, starts, product_dtype)


def polar_gram(
    stack: Tensor,
    coefficients: Coefficients,
    *,
    product_dtype: torch.dtype = torch.float32,
    restarts: tuple[int, ...] | None = None,
) -> Tensor:
    """The same by as few Gram matrices as the restarts want; see `reference.polar_gram`."""
    _require_stack("polar_gram", stack)
    require_gram_dtype(product_dtype)
    if restarts is None:
        restarts = plan_restarts(coefficients, torch.finfo(product_dtype).eps)
    return _run(stack, coefficients, restarts, product_dtype)


def plan_stretches(rows: int, columns: int, coefficients: Coefficients, dtype: torch.dtype) -> tuple[int, ...]:
    """Before which steps of the standard form the Gram matrix is made anew: two are joined where that is less work, and
    what rounding does to the Gram matrix stays small beside 1, spread over the small side as it is."""
    small, large = sorted((rows, columns))
    steps = len(coefficients)
    if small < _LEAST or large < _LONG * small:
        return tuple(range(1, steps))
    starts, step = [], 0
    while step < steps:
        starts.append(step)
        growth = math.prod(a * a for a, _, _ in coefficients[step : step + 2])
        step += 2 if torch.finfo(dtype).eps * growth <= math.sqrt(small / 2) else 1
    return tuple(starts)


def polar_kernels() -> tuple[Kernel, ...]:
    """Both forms."""
    return tuple(Kernel(name, IMPLEMENTATION, each) for name, each in (("polar", polar), ("polar_gram", polar_gram)))


def _require_stack(kernel: str, stack: Tensor) -> None:
    if stack.dim() != 3 or stack.dtype not in KINDS or not stack.is_cpu:
        dtype = str(stack.dtype).removeprefix("torch.")
        raise ValueError(
            f"kernel {kernel!r} got a stack of {dtype}{list(stack.shape)} on {stack.device}, wanted three dimensions "
            f"of float32, bfloat16 or float16 on cpu; give it a stack [b, n, m] of matrices"
        )


def _run(stack: Tensor, coefficients: Coefficients, starts: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    results = torch.empty(stack.shape, dtype=stack.dtype)
    if stack.numel() == 0:
        return results
    work = _Work(choose_products(dtype), stack.shape[1], stack.shape[2])
    for matrix, result in zip(stack, results, strict=True):
        work.run(matrix.contiguous(), coefficients, starts, result)
    return results


class _Work:
    """Memory for matrices of one shape, and the steps on it. Every matrix lies in the same places: what a product's
    last bits are may depend on how its factors are aligned."""

    def __init__(self, products: Products, rows: int, columns: int) -> None:
        self._products = products
        self._tall = rows > columns
        small = min(rows, columns)
        self._x, self._next = (torch.empty(rows, columns, dtype=products.dtype) for _ in range(2))
        self._gram, self._product, self._q, self._spare = (
            torch.empty(small, small, dtype=products.dtype) for _ in range(4)
        )

    def run(self, matrix: Tensor, coefficients: Coefficients, starts: tuple[int, ...], result: Tensor) -> None:
        """Write the polar factor of `matrix` into `result`."""
        normalize(matrix, self._x)
        steps = len(coefficients)
        begins = sorted({0, *starts} & set(range(steps)))
        for begin, end in itertools.pairwise([*begins, steps]):
            self._make_gram()
            for step in range(begin, end):
                self._take_step(coefficients[step], first=step == begin, last=step == end - 1)
            self._multiply_x()
        result.copy_(self._x)

    def _make_gram(self) -> None:
        x = self._x.mT if self._tall else self._x
        self._products.multiply_symmetric(x, x.mT, self._gram)

    def _take_step(self, step: tuple[float, float, float], *, first: bool, last: bool) -> None:
        """Q joins the product P, and takes the Gram matrix along if there is another step: G <- Q G Q."""
        a, b, c = step
        q = self._product if first else self._q
        self._products.add_symmetric(self._gram, b, c, q)
        q.diagonal().add_(a)
        if not first:
            self._products.multiply_symmetric(q, self._product, self._spare)
            self._product, self._spare = self._spare, self._product
        if not last:
            self._products.multiply_symmetric(q, self._gram, self._spare)
            self._products.multiply_symmetric(q, self._spare, self._gram)

    def _multiply_x(self) -> None:
        if self._tall:
            self._products.multiply(self._x, self._product, self._next)
        else:
            self._products.multiply(self._product, self._x, self._next)
        self._x, self._next = self._next, self._x
