"""Muon: momentum, an orthogonal direction of it for each matrix, one scale for every shape (Jordan et al. 2024).

[Note: one definition] `update_matrix` is the definition: one matrix, one process. What runs on many ranks is made of
the same three kernels, with nothing but copies between them, so it gives the same bits: `MuonUpdate` blends where the
rows are, orthogonalises where the plan says, and applies where the rows are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.accelerator.polar import COEFFICIENTS, Coefficients, Form
from windlass.core.specs import dtype_from_name

Scale = Literal["rms", "original", "spectral"]
Clip = Literal["pre", "off"]
MOMENTUM = "momentum"
TAG = "muon"
"""Of what Muon allocates and sends."""


@dataclass(frozen=True)
class MuonSettings:
    """One parameter group's hyper-parameters, read anew for every step."""

    lr: float
    momentum: float = 0.95
    weight_decay: float = 0.01


@dataclass(frozen=True)
class MuonRules:
    """What is the same for all groups and steps, and so is part of the plan. All of it is data."""

    coefficients: Coefficients = COEFFICIENTS["jordan"]
    product_dtype: str = "float32"  # of Newton-Schulz's matrix products
    direction_dtype: str = "float32"  # in which update inputs and directions are kept, and travel
    form: Literal["standard", "gram", "auto"] = "auto"  # auto: for each shape the one of fewer operations
    measured_forms: Mapping[str, Form] = field(default_factory=dict)  # "rows x columns" -> what was faster here
    scale: Scale = "rms"
    clip: Clip = "pre"
    nesterov: bool = True
    momentum_dtype: str = "float32"  # or bfloat16, rounded stochastically


def require_muon(settings: object) -> MuonSettings:
    """The settings of a group that Muon updates; TypeError for those of another algorithm."""
    if not isinstance(settings, MuonSettings):
        raise TypeError("a parameter that Muon updates is in a group with the settings of AdamW")
    return settings


def update_scale(rows: int, columns: int, scale: Scale) -> float:
    """What an orthogonal direction [rows, columns] is multiplied with.

    rms: 0.2 sqrt(max(rows, columns)) gives the elements the root mean square of AdamW's updates, so that its learning
    rate and decay carry over (Liu et al. 2025, arXiv 2502.16982); original: sqrt(max(1, rows / columns)) (Jordan et
    al. 2024); spectral: sqrt(rows / columns) (Bernstein & Newhouse 2024).
    """
    if scale == "rms":
        return 0.2 * math.sqrt(max(rows, columns))
    if scale == "original":
        return math.sqrt(max(1.0, rows / columns))
    return math.sqrt(rows / columns)


def momentum_scalars(settings: MuonSettings) -> Tensor:
    """[2] fp32 on the host: what the kernel momentum_blend reads."""
    return torch.tensor((settings.momentum, 1 - settings.momentum), dtype=torch.float32)


def decay_scalars(settings: MuonSettings, scale: float) -> Tensor:
    """[3] fp32 on the host: what the kernel scale_decay_update reads."""
    return torch.tensor((settings.lr, settings.weight_decay, scale), dtype=torch.float32)


def orthogonalise(stack: Tensor, form: Form, rules: MuonRules, accelerator: Accelerator) -> Tensor:
    """Polar factors of the matrices [b, rows, columns], by the rules' coefficients in the form that the plan chose."""
    kernel = accelerator.kernels["polar" if form == "standard" else "polar_gram"]
    result: Tensor = kernel(stack, rules.coefficients, product_dtype=dtype_from_name(rules.product_dtype))
    return result


def update_matrix(
    weight: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    low: Tensor | None,
    settings: MuonSettings,
    rules: MuonRules,
    accelerator: Accelerator,
    *,
    form: Form = "standard",
    gradient_scale: Tensor | None = None,
    keep: Tensor | None = None,
    noise: Tensor | None = None,
) -> None:
    """One matrix [rows, columns], in place: `weight` fp32, its copy `low` in 16 bits or None, `momentum` in the rules'
    dtype. `gradient_scale` [] fp32 (1), `keep` [] bool (true): false leaves everything as it was. `noise`: int64 [2]
    for a momentum of 16 bits."""
    device, kernels = weight.device, accelerator.kernels
    scale = torch.ones((), device=device) if gradient_scale is None else gradient_scale
    keep = torch.ones((), dtype=torch.bool, device=device) if keep is None else keep
    blended = torch.empty(weight.numel(), dtype=dtype_from_name(rules.direction_dtype), device=device)
    numbers = momentum_scalars(settings).to(device)
    after, blended = kernels["momentum_blend"](
        momentum.view(-1), gradient.reshape(-1), blended, numbers, scale, keep, noise, nesterov=rules.nesterov
    )
    momentum.copy_(after.view_as(momentum))
    direction = orthogonalise(blended.view(1, *weight.shape), form, rules, accelerator).view(-1)
    rows, columns = weight.shape
    numbers = decay_scalars(settings, update_scale(rows, columns, rules.scale)).to(device)
    flat_low = None if low is None else low.view(-1)
    new, new_low = kernels["scale_decay_update"](weight.view(-1), direction, numbers, keep, flat_low)
    weight.copy_(new.view_as(weight))
    if low is not None:
        low.copy_(new_low.view_as(low))
