"""Arguments for the norms, their results in float64, and how far an implementation may be from each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from windlass.conformance.kernel_cases import Doubles

FLOAT = float(torch.finfo(torch.float32).eps)
Bound = tuple[Doubles, Doubles]
"""A result in float64, and the error that is allowed of each element."""


@dataclass(frozen=True)
class NormCase:
    """What goes into a norm and what comes back, on the host; `centred` says that it is LayerNorm."""

    centred: bool
    input: Tensor  # [t, h]
    weight: Tensor | None  # [h]
    bias: Tensor | None  # [h]
    output_gradient: Tensor  # as input
    eps: float


def make_case(
    tokens: int,
    size: int,
    *,
    centred: bool,
    dtype: torch.dtype = torch.float32,
    weight: torch.dtype | None = torch.float32,
    bias: bool = True,
    eps: float = 1e-5,
    scale: float = 1.0,
    seed: int = 0,
) -> NormCase:
    """Rows of their own sizes and offsets, `scale` times; weights around 1."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    rows = (normal(tokens, size) + 2 * normal(tokens, 1)) * normal(tokens, 1).exp() * scale
    return NormCase(
        centred=centred,
        input=rows.to(dtype),
        weight=None if weight is None else (1 + 0.3 * normal(size)).to(weight),
        bias=(0.5 * normal(size)).to(weight or torch.float32) if centred and bias else None,
        output_gradient=normal(tokens, size).to(dtype),
        eps=eps,
    )


def bound_forward(case: NormCase) -> dict[str, Bound]:
    """output, mean (of LayerNorm) and rstd."""
    x, size = _doubles(case.input), case.input.shape[1]
    row = (size / 16 + 8) * FLOAT
    mean = x.mean(-1, keepdims=True) * case.centred
    mean_error = row * np.abs(x).mean(-1, keepdims=True) * case.centred
    centred = x - mean
    variance = (centred**2).mean(-1, keepdims=True)
    variance_error = (row + 4 * FLOAT) * variance + mean_error**2
    rstd = 1 / np.sqrt(variance + case.eps)
    most = 1 / np.sqrt(np.maximum(variance - variance_error, 0) + case.eps)
    rstd_error = most - rstd + 4 * FLOAT * rstd
    normal = centred * rstd
    normal_error = mean_error * most + np.abs(centred) * rstd_error + 4 * FLOAT * np.abs(normal)
    weight, bias = _weights(case)
    output = normal * weight + bias
    output_error = np.abs(weight) * normal_error + 4 * FLOAT * (np.abs(normal * weight) + np.abs(bias))
    bounds = {"output": (output, output_error + _rounding(output, case.input.dtype))}
    if case.centred:
        bounds["mean"] = (mean[:, 0], mean_error[:, 0] + 1e-45)
    return bounds | {"rstd": (rstd[:, 0], rstd_error[:, 0])}


def statistics_of(case: NormCase) -> tuple[Tensor, Tensor]:
    """mean and rstd of a forward pass, rounded to fp32."""
    x = case.input.double()
    mean = x.mean(-1) if case.centred else torch.zeros(len(x), dtype=torch.float64)
    variance = (x - mean[:, None]).square().mean(-1)
    return mean.float(), (1 / (variance + case.eps).sqrt()).float()


def bound_backward(case: NormCase, mean: Tensor, rstd: Tensor) -> dict[str, Bound]:
    """input_gradient, and the gradients of weight and bias if there are any, from the statistics as they are given."""
    tokens, size = case.input.shape
    row, column = (size / 16 + 8) * FLOAT, (tokens / 16 + 8) * FLOAT
    scale = _doubles(rstd)[:, None]
    normal = (_doubles(case.input) - _doubles(mean)[:, None]) * scale
    gradient = _doubles(case.output_gradient)
    weight, _ = _weights(case)
    inner = gradient * weight
    first = inner.mean(-1, keepdims=True) * case.centred
    second = (inner * normal).mean(-1, keepdims=True)
    back = (inner - first - normal * second) * scale
    first_error = row * np.abs(inner).mean(-1, keepdims=True) * case.centred
    second_error = (row + 8 * FLOAT) * np.abs(inner * normal).mean(-1, keepdims=True)
    terms = np.abs(inner) + np.abs(first) + np.abs(normal * second)
    back_error = scale * (12 * FLOAT * terms + first_error + np.abs(normal) * second_error)
    bounds = {"input_gradient": (back, back_error + _rounding(back, case.input.dtype))}
    if case.weight is not None:
        total = (gradient * normal).sum(0)
        error = (column + 8 * FLOAT) * np.abs(gradient * normal).sum(0)
        bounds["weight_gradient"] = (total, error + _rounding(total, case.weight.dtype))
    if case.bias is not None:
        total = gradient.sum(0)
        error = column * np.abs(gradient).sum(0)
        bounds["bias_gradient"] = (total, error + _rounding(total, case.bias.dtype))
    return bounds


def shares_of(found: Tensor, bound: Bound) -> Doubles:
    """The error of each element, as a share of what is allowed."""
    wanted, allowed = bound
    error = np.abs(found.double().numpy() - wanted)
    return np.where(error == 0, 0, error / np.maximum(allowed, 1e-300))


def _doubles(values: Tensor) -> Doubles:
    doubles: Doubles = values.double().numpy()
    return doubles


def _weights(case: NormCase) -> tuple[Doubles, Doubles]:
    size = case.input.shape[1]
    weight = np.ones(size) if case.weight is None else _doubles(case.weight)
    return weight, np.zeros(size) if case.bias is None else _doubles(case.bias)


def _rounding(values: Doubles, dtype: torch.dtype) -> Doubles:
    """An eps of each value, and of the smallest numbers of fp16 that still have all their bits."""
    info = torch.finfo(dtype)
    smallest = float(info.tiny) if dtype is torch.float16 else 1e-37
    allowed: Doubles = float(info.eps) * (np.abs(values) + smallest)
    return allowed
