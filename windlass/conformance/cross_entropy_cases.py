"""Arguments for linear_cross_entropy, its results in float64, and how far an implementation may be from each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from windlass.conformance.norm_cases import FLOAT, Bound

IGNORED = -100


@dataclass(frozen=True)
class CrossEntropyCase:
    """The last layer of a model and what it should say, on the host."""

    hidden: Tensor  # [t, h]
    weight: Tensor  # [v, h]
    targets: Tensor  # [t]
    scales: Tensor | None = None  # [t]


def make_case(
    tokens: int,
    size: int,
    vocabulary: int,
    *,
    dtype: torch.dtype = torch.float32,
    spread: float = 2.0,
    ignored: float = 0.2,
    scaled: bool = False,
    seed: int = 0,
) -> CrossEntropyCase:
    """Logits of standard deviation `spread`; a share of the targets is ignored."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, generator=random)
    weight = torch.randn(vocabulary, size, generator=random) * spread / size**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=random)
    left_out = torch.rand(tokens, generator=random) < ignored
    scales = torch.rand(tokens, generator=random) * 2 - 1 if scaled else None
    return CrossEntropyCase(hidden.to(dtype), weight.to(dtype), torch.where(left_out, IGNORED, targets), scales)


def bound_cross_entropy(case: CrossEntropyCase) -> dict[str, Bound]:
    """losses, hidden_gradient and weight_gradient, and the tolerance of the schema. All targets are valid."""
    hidden, weight = case.hidden.double().numpy(), case.weight.double().numpy()
    (tokens, size), vocabulary = hidden.shape, len(weight)
    unit = float(torch.finfo(case.hidden.dtype).eps)
    kept = FLOAT if case.hidden.dtype is torch.float16 else unit
    counted = case.targets.numpy() != IGNORED
    target = np.where(counted, case.targets.numpy(), 0)
    rows = np.arange(tokens)

    logits = hidden @ weight.T
    logit_error = unit * np.abs(logits) + (size + 4) * FLOAT * (np.abs(hidden) @ np.abs(weight).T) + 1e-300
    top = logits.max(-1, keepdims=True)
    log_sum = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    softmax = np.exp(logits - log_sum)
    # log(sum p e^d) for errors up to d of the logits: how far log-sum-exp may be, up or down (Jensen).
    sum_error = np.log1p((softmax * np.expm1(logit_error)).sum(-1))
    losses = log_sum[:, 0] - logits[rows, target]
    largest = np.maximum(np.maximum(1, np.abs(logits).max(-1)), losses)
    fuzz = (16 + vocabulary / 16) * FLOAT * largest
    loss_error = logit_error[rows, target] + sum_error + fuzz

    differences = softmax.copy()
    differences[rows, target] -= 1
    difference_error = softmax * np.expm1(logit_error + (sum_error + fuzz)[:, None])
    scales = np.ones(tokens) if case.scales is None else case.scales.double().numpy()
    factor = (scales * counted)[:, None]
    differences, difference_error = differences * factor, difference_error * np.abs(factor)
    difference_error += (unit * np.abs(differences) + 2.0**-38) * counted[:, None]

    back, total = differences @ weight, differences.T @ hidden
    size_error = difference_error @ np.abs(weight)
    size_error += (vocabulary + 4) * FLOAT * (np.abs(differences) @ np.abs(weight))
    weight_error = difference_error.T @ np.abs(hidden)
    weight_error += (tokens + 4) * FLOAT * (np.abs(differences).T @ np.abs(hidden))
    return {
        "losses": (losses * counted, loss_error * counted),
        "hidden_gradient": (back, size_error + kept * np.abs(back)),
        "weight_gradient": (total, weight_error + kept * np.abs(total)),
    }
