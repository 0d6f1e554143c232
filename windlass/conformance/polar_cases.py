"""Matrices for the kernel polar, and what becomes of them by their singular values, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from windlass.accelerator.polar import Coefficients
from windlass.conformance.kernel_cases import Doubles


@dataclass(frozen=True)
class PolarBounds:
    """Results in float64 of the matrices of a stack, and how far from each an implementation may be."""

    wanted: Doubles  # [b, n, m]
    allowed: Doubles  # [b], of the Frobenius norm of the error
    largest: float  # the largest value that a singular value in [0, 1] can become


def with_spectrum(values: Doubles, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A matrix on the host with these singular values, padded by zeros, between random orthogonal factors."""
    random = np.random.default_rng(seed)
    left, _ = np.linalg.qr(random.standard_normal((rows, rows)))
    right, _ = np.linalg.qr(random.standard_normal((columns, columns)))
    count = len(values)
    return torch.from_numpy((left[:, :count] * values) @ right[:, :count].T).float()


def make_matrices(rows: int, columns: int, seed: int = 0) -> dict[str, Tensor]:
    """Matrices of one shape by name: well conditioned, ill conditioned, of low rank, and none at all."""
    least = min(rows, columns)
    places = np.arange(1.0, least + 1)
    gaussian = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return {
        "gaussian": gaussian,
        "1/k": with_spectrum(1 / places, rows, columns, seed + 1),
        "1/k^2": with_spectrum(1 / places**2, rows, columns, seed + 2),
        "a third of the rank": with_spectrum(np.ones(max(least // 3, 1)), rows, columns, seed + 3),
        "rank one": with_spectrum(np.ones(1), rows, columns, seed + 4),
        "one element": _with_one_element(rows, columns),
        "zero": torch.zeros(rows, columns),
    }


def _with_one_element(rows: int, columns: int) -> Tensor:
    matrix = torch.zeros(rows, columns)
    matrix[-1, 0] = -3.0
    return matrix


def bound_polar(stack: Tensor, coefficients: Coefficients, product_dtype: torch.dtype) -> PolarBounds:
    """U p(S) V^T of each matrix U S V^T of norm 1, and the tolerance of the schema."""
    matrices = stack.double().numpy()
    count, rows, columns = matrices.shape
    norms = np.sqrt((matrices**2).sum((-2, -1), keepdims=True))
    left, values, right = np.linalg.svd(matrices / np.where(norms == 0, 1, norms), full_matrices=False)
    factor, sums = float(torch.finfo(product_dtype).eps), 2 * float(torch.finfo(torch.float32).eps)
    noise = np.zeros((count, rows, columns))  # squares, in the basis of the singular vectors
    diagonal = np.arange(values.shape[-1])
    noise[:, diagonal, diagonal] = (sums * values) ** 2  # of the scaling
    anywhere = np.linspace(0, 1, 20_001)
    for a, b, c in coefficients:
        slopes = _slopes(_padded(values, rows)[:, :, None], _padded(values, columns)[:, None, :], a, b, c)
        size = abs(a) * values + abs(b) * values**3 + abs(c) * values**5
        fresh = (factor**2 + sums**2) * (size**2).sum(-1) / (rows * columns)
        noise = slopes**2 * noise + fresh[:, None, None]
        values = a * values + b * values**3 + c * values**5
        anywhere = a * anywhere + b * anywhere**3 + c * anywhere**5
    wanted = (left * values[:, None, :]) @ right
    rounding = float(torch.finfo(stack.dtype).eps) / 2 * np.sqrt((values**2).sum(-1))
    return PolarBounds(wanted, np.sqrt(noise.sum((-2, -1))) + rounding, float(np.abs(anywhere).max()))


def _padded(values: Doubles, length: int) -> Doubles:
    """Singular values of a stack and zeros: the directions beyond the smaller side have none."""
    return np.pad(values, ((0, 0), (0, length - values.shape[-1])))


def _slopes(x: Doubles, y: Doubles, a: float, b: float, c: float) -> Doubles:
    """How much an odd polynomial of a matrix enlarges what is added between two singular directions: the larger of
    (p(x) - p(y)) / (x - y) and (p(x) + p(y)) / (x + y), Higham 2008, "Functions of Matrices", chapter 3."""
    squares, mixed = x**2 + y**2, x * y
    fourths = x**4 + x**2 * y**2 + y**4
    common, odd = a + b * squares + c * fourths, b * mixed + c * mixed * squares
    return np.maximum(np.abs(common + odd), np.abs(common - odd))
