"""AdamW: of one vector, of many at once, and with moments of 16 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from windlass.accelerator.kernels import Kernels, KernelSchema
from windlass.accelerator.reference.noise import high_half, low_half, make_noise, round_stochastically
from windlass.accelerator.reference.tolerances import SUBNORMAL

Part = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""weight, gradient, exp_avg, exp_avg_sq, low: what `adamw_many` updates at once, many times over."""
Updated = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""weight, exp_avg, exp_avg_sq, low."""

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
        "16 ulp of its own; equal bits however the vector is sliced, which a reference need not give on a lazy device, "
        f"whose compiler rounds a product or not before it is added to something; {SUBNORMAL}"
    ),
)

ADAMW_MANY = KernelSchema(
    name="adamw_many",
    signature=(
        "(parts: sequence of (weight f32[n], gradient f32|bf16|f16[n], exp_avg f32[n], exp_avg_sq f32[n], "
        "low bf16|f16[n] or None), scalars f32[rows, 9], rows: sequence of int, the row of each part, "
        "gradient_scale f32[], keep bool[], *, decoupled: bool) -> list of (weight, exp_avg, exp_avg_sq, low)"
    ),
    consumes=("weight, exp_avg, exp_avg_sq and low of each part",),
    rounding=ADAMW.rounding,
    tolerance=f"each part to the bit as the implementation's own adamw, and so: {ADAMW.tolerance}",
)

ADAMW_BF16_MOMENTS = KernelSchema(
    name="adamw_bf16_moments",
    signature=(
        "(weight f32[n], gradient f32|bf16|f16[n], exp_avg bf16[n], exp_avg_sq bf16[n], scalars f32[9], "
        "gradient_scale f32[], keep bool[], low bf16|f16[n] or None, noise i64[2]: seed and index of the first "
        "element, *, decoupled: bool) -> (weight, exp_avg, exp_avg_sq, low)"
    ),
    consumes=("weight", "exp_avg", "exp_avg_sq", "low"),
    rounding=(
        "as adamw, from the moments as they are; then each new moment is rounded stochastically, by the lower half of "
        "the element's noise the first and by the upper half the second"
    ),
    tolerance=(
        "weight and low as adamw; a moment is one of the two bf16 numbers around some value within the tolerance of "
        "adamw's, and that which `round_stochastically` makes of such a value"
    ),
)


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
) -> Updated:
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


def adamw_many(
    kernels: Kernels,
    parts: Sequence[Part],
    scalars: Tensor,
    rows: Sequence[int],
    gradient_scale: Tensor,
    keep: Tensor,
    *,
    decoupled: bool = True,
) -> list[Updated]:
    """One AdamW update of many vectors, one after the other by the chosen `adamw`; a device may do them all at once."""
    adamw_of_one = kernels["adamw"]
    results = []
    for (weight, gradient, exp_avg, exp_avg_sq, low), row in zip(parts, rows, strict=True):
        arguments = (weight, gradient, exp_avg, exp_avg_sq, scalars[row], gradient_scale, keep, low)
        results.append(adamw_of_one(*arguments, decoupled=decoupled))
    return results


def adamw_bf16_moments(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    gradient_scale: Tensor,
    keep: Tensor,
    low: Tensor | None,
    noise: Tensor,
    *,
    decoupled: bool = True,
) -> Updated:
    """One AdamW update whose moments take two bytes each. Rounding to nearest would leave a moment of slow change as it
    is for ever; stochastic rounding is right in the mean (Zamirai et al. 2020, "Revisiting BFloat16 Training")."""
    first, second = exp_avg.to(torch.float32), exp_avg_sq.to(torch.float32)
    adamw(weight, gradient, first, second, scalars, gradient_scale, keep, low, decoupled=decoupled)
    chance = make_noise(noise, weight.numel())
    exp_avg.copy_(torch.where(keep, round_stochastically(first, low_half(chance)), exp_avg))
    exp_avg_sq.copy_(torch.where(keep, round_stochastically(second, high_half(chance)), exp_avg_sq))
    return weight, exp_avg, exp_avg_sq, low
