"""Reductions and casts of vectors: square_sum and scale_cast."""

from __future__ import annotations

import torch
from torch import Tensor

from windlass.accelerator.kernels import KernelSchema
from windlass.accelerator.reference.tolerances import SUBNORMAL

SQUARE_SUM = KernelSchema(
    name="square_sum",
    signature=(
        "(values f32|bf16|f16[n], scale f32[]) -> f32[2]: sum of (scale * value)^2, and 1 if any value is inf or nan"
    ),
    consumes=(),
    rounding="fp32 products; sums in fp32 or wider, rounded to fp32; the order of summation depends on n only",
    tolerance=f"1e-6 relative for any n, by blocked or pairwise summation; {SUBNORMAL}",
)

SCALE_CAST = KernelSchema(
    name="scale_cast",
    signature="(destination any float[n], source any float[n], scale f32[]) -> destination = cast(scale * source)",
    consumes=("destination",),
    rounding="product in fp32, then to nearest even in the dtype of destination",
    tolerance=f"exact; {SUBNORMAL}",
)


def square_sum(values: Tensor, scale: Tensor) -> Tensor:
    """Sum of squares and a finite check in one pass over `values`."""
    scaled = values.to(torch.float32) * scale
    bad = torch.logical_not(torch.isfinite(values).all()).to(torch.float32)
    return torch.stack([(scaled * scaled).sum(), bad])


def scale_cast(destination: Tensor, source: Tensor, scale: Tensor) -> Tensor:
    """Scale in fp32 and cast: the one place where a dtype changes."""
    return destination.copy_(source.to(torch.float32) * scale)
