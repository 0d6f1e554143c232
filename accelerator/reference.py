"""Every kernel in plain tensor operations: the fallback of every backend and the oracle of the suite.

Importing this file imports torch, so the package itself does not; a backend does, when it is opened.
"""

from __future__ import annotations

import torch
from torch import Tensor

from windlass.accelerator.kernels import REFERENCE, Kernel, KernelSchema

# Layout of the `scalars` vector of adamw: one small device vector per group and step count, so that a new
# learning rate recompiles nothing. The complements are passed because 1 - beta in fp32 loses five digits.
ADAMW_SCALARS = (
    "lr", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "weight_decay",
    "bias_correction1", "bias_correction2",
)  # fmt: skip

ADAMW = KernelSchema(
    name="adamw",
    signature=(
        "(weight f32[n], gradient f32|bf16|f16[n], exp_avg f32[n], exp_avg_sq f32[n], scalars f32[9], "
        "gradient_scale f32[], keep bool[], low bf16|f16[n] or None, *, decoupled: bool) "
        "-> (weight, exp_avg, exp_avg_sq, low)"
    ),
    consumes=("weight", "exp_avg", "exp_avg_sq", "low"),
    rounding="fp32 throughout; low is weight rounded to nearest even",
    tolerance=(
        "4 ulp of fp32 of the largest term of each sum; the update in weight, itself a quotient of such sums, "
        "16 ulp of its own; equal bits however the vector is sliced"
    ),
)

SQUARE_SUM = KernelSchema(
    name="square_sum",
    signature=(
        "(values f32|bf16|f16[n], scale f32[]) -> f32[2]: sum of (scale * value)^2, and 1 if any value is inf or nan"
    ),
    consumes=(),
    rounding="fp32 products; sums in fp32 or wider, rounded to fp32; the order of summation depends on n only",
    tolerance="1e-6 relative for any n, by blocked or pairwise summation",
)

SCALE_CAST = KernelSchema(
    name="scale_cast",
    signature="(destination any float[n], source any float[n], scale f32[]) -> destination = cast(scale * source)",
    consumes=("destination",),
    rounding="product in fp32, then to nearest even in the dtype of destination",
    tolerance="exact",
)

SCHEMAS = (ADAMW, SQUARE_SUM, SCALE_CAST)


def adamw(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    gradient_scale: Tensor,
    keep: Tensor,
    low: Tensor | None,
    *,
    decoupled: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One AdamW update (Loshchilov & Hutter 2019), or Adam with L2 in the gradient when not `decoupled`.

    `keep` false leaves everything as it was: an overflow is skipped without a branch on the host.
    """
    lr, _beta1, rest1, beta2, rest2, eps, decay, correction1, correction2 = scalars.unbind()
    g = gradient.to(torch.float32) * gradient_scale
    w = weight * (1 - lr * decay) if decoupled else weight
    if not decoupled:
        g = g + decay * weight
    m = exp_avg + rest1 * (g - exp_avg)
    v = beta2 * exp_avg_sq + rest2 * (g * g)
    w = w - (lr / correction1) * (m / ((v.sqrt() / correction2.sqrt()) + eps))
    weight.copy_(torch.where(keep, w, weight))
    exp_avg.copy_(torch.where(keep, m, exp_avg))
    exp_avg_sq.copy_(torch.where(keep, v, exp_avg_sq))
    if low is not None:
        low.copy_(torch.where(keep, weight.to(low.dtype), low))
    return weight, exp_avg, exp_avg_sq, low


def square_sum(values: Tensor, scale: Tensor) -> Tensor:
    """Sum of squares and a finite check in one pass over `values`."""
    scaled = values.to(torch.float32) * scale
    bad = torch.logical_not(torch.isfinite(values).all()).to(torch.float32)
    return torch.stack([(scaled * scaled).sum(), bad])


def scale_cast(destination: Tensor, source: Tensor, scale: Tensor) -> Tensor:
    """Scale in fp32 and cast: the one place where a dtype changes."""
    return destination.copy_(source.to(torch.float32) * scale)


def reference_kernels() -> tuple[Kernel, ...]:
    """All references, lowest priority."""
    return tuple(
        Kernel(name, REFERENCE, function, priority=0)
        for name, function in (("adamw", adamw), ("square_sum", square_sum), ("scale_cast", scale_cast))
    )
