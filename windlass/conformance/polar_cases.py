"""Matrices for the kernels polar and polar_gram, and what becomes of them by their singular values, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    left, values, right = _decompose(stack)
    unit = float(np.hypot(torch.finfo(product_dtype).eps, _SUMS))
    noise = _scaling_noise(values, left.shape[1], right.shape[2])
    for step in coefficients:
        noise, values = _take_step(noise, values, step, unit)
    return _make_bounds(stack, left, values, right, noise, coefficients)


def bound_polar_gram(
    stack: Tensor, coefficients: Coefficients, product_dtype: torch.dtype, restarts: tuple[int, ...]
) -> PolarBounds:
    """The same results, and the tolerance of the Gram form's schema."""
    if stack.shape[1] > stack.shape[2]:
        turned = bound_polar_gram(stack.mT, coefficients, product_dtype, restarts)
        return replace(turned, wanted=turned.wanted.swapaxes(1, 2))
    left, values, right = _decompose(stack)
    rows, columns = left.shape[1], right.shape[2]
    factor = float(torch.finfo(product_dtype).eps) / 4
    unit = float(np.hypot(factor, _SUMS))
    noise = _scaling_noise(values, rows, columns)
    starts = sorted({0, *restarts} & set(range(len(coefficients))))
    for begin, end in zip(starts, [*starts[1:], len(coefficients)], strict=True):
        steps = coefficients[begin:end]
        added = _gram_noise(values, steps, factor, unit)
        noise = noise + _spread(unit * values, rows * columns)  # X is rounded before its Gram matrix is made
        for step in steps:
            noise, values = _take_step(noise, values, step, unit)
        noise[:, :, :rows] += added
    return _make_bounds(stack, left, values, right, noise, coefficients)


_SUMS = 2 * float(torch.finfo(torch.float32).eps)


def _decompose(stack: Tensor) -> tuple[Doubles, Doubles, Doubles]:
    """The singular value decomposition of each matrix divided by its norm."""
    matrices = stack.double().numpy()
    norms = np.sqrt((matrices**2).sum((-2, -1), keepdims=True))
    left, values, right = np.linalg.svd(matrices / np.where(norms == 0, 1, norms), full_matrices=False)
    return left, values, right


def _scaling_noise(values: Doubles, rows: int, columns: int) -> Doubles:
    """Squares of the errors of scaling, in the basis of the singular vectors."""
    noise = np.zeros((len(values), rows, columns))
    diagonal = np.arange(values.shape[-1])
    noise[:, diagonal, diagonal] = (_SUMS * values) ** 2
    return noise


def _spread(errors: Doubles, elements: int) -> Doubles:
    """Squares of errors of a matrix, given by their norms in each singular direction, as evenly spread over it."""
    share: Doubles = (errors**2).sum(-1)[:, None, None] / elements
    return share


def _take_step(
    noise: Doubles, values: Doubles, step: tuple[float, float, float], unit: float
) -> tuple[Doubles, Doubles]:
    """What a step makes of noise, which it adds to, and of singular values."""
    a, b, c = step
    _, rows, columns = noise.shape
    slopes = _slopes(_padded(values, rows)[:, :, None], _padded(values, columns)[:, None, :], a, b, c)
    size = abs(a) * values + abs(b) * values**3 + abs(c) * values**5
    noise = slopes**2 * noise + _spread(unit * size, rows * columns)
    return noise, a * values + b * values**3 + c * values**5


def _make_bounds(
    stack: Tensor, left: Doubles, values: Doubles, right: Doubles, noise: Doubles, coefficients: Coefficients
) -> PolarBounds:
    anywhere = np.linspace(0, 1, 20_001)
    for a, b, c in coefficients:
        anywhere = a * anywhere + b * anywhere**3 + c * anywhere**5
    wanted = (left * values[:, None, :]) @ right
    rounding = float(torch.finfo(stack.dtype).eps) / 2 * np.sqrt((values**2).sum(-1))
    return PolarBounds(wanted, np.sqrt(noise.sum((-2, -1))) + rounding, float(np.abs(anywhere).max()))


def _gram_noise(start: Doubles, steps: Coefficients, factor: float, unit: float) -> Doubles:
    """Squares of what the errors of Gram matrices and of the product P of all steps come to, once P has met X.

    G has eigenvalues g and P has p. The rest of the steps is P <- h(G) P, a function of G alone, so that an error of G
    becomes one of P by the divided difference of h (Higham 2008, chapter 3), and one of P itself by h.
    """
    elements = start.shape[-1] ** 2
    g, p, x = [start**2], [np.ones_like(start)], [start]
    largest = (start**2).sum(-1, keepdims=True)  # the sum of sizes of the terms of X X^T
    of_gram = [_spread(np.concatenate([factor * g[0], _SUMS * largest], -1), elements)]
    of_product = []
    for a, b, c in steps:
        q, size = a + b * g[-1] + c * g[-1] ** 2, abs(a) + abs(b) * g[-1] + abs(c) * g[-1] ** 2
        of_product.append(_spread(unit * size * p[-1], elements))
        of_gram.append(_spread(unit * size**2 * g[-1], elements))
        g.append(q**2 * g[-1])
        p.append(q * p[-1])
        x.append(q * x[-1])
    noise = np.zeros((*start.shape, start.shape[-1]))
    h, difference = np.ones_like(start), np.zeros_like(noise)
    for step in reversed(range(len(steps))):
        a, b, c = steps[step]
        noise += (h[:, :, None] * start[:, None, :]) ** 2 * of_product[step]
        left, right = g[step][:, :, None], g[step][:, None, :]
        q_left = a + b * left + c * left**2
        q_right, slope = q_left.swapaxes(1, 2), b + c * (left + right)
        # Of h(g) = q(g) h'(g q(g)^2), by the product rule of divided differences.
        onward = q_left**2 + right * (q_left + q_right) * slope
        difference = slope * h[:, :, None] + q_right * difference * onward
        h = q_left[:, :, 0] * h
        noise += (difference * x[step][:, None, :]) ** 2 * of_gram[step]
    return noise


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
