"""Every kernel in plain tensor operations: the fallback of every backend and the oracle of the suite.

Importing this file imports torch, so the package itself does not; a backend does, when it is opened.
"""

from __future__ import annotations

import torch
from torch import Tensor

from windlass.accelerator.kernels import REFERENCE, Kernel, KernelSchema
from windlass.accelerator.polar import Coefficients

# Layout of the `scalars` vector of adamw: one small device vector per group and step count, so that a new
# learning rate recompiles nothing. The complements are passed because 1 - beta in fp32 loses five digits.
ADAMW_SCALARS = (
    "lr", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2", "eps", "weight_decay",
    "bias_correction1", "bias_correction2",
)  # fmt: skip

_SUBNORMAL = (
    "where the device's own arithmetic takes numbers below 2^-126 for zero, each of them, given, found on the way or "
    "returned, may be a zero of its sign"
)

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
        f"whose compiler rounds a product or not before it is added to something; {_SUBNORMAL}"
    ),
)

SQUARE_SUM = KernelSchema(
    name="square_sum",
    signature=(
        "(values f32|bf16|f16[n], scale f32[]) -> f32[2]: sum of (scale * value)^2, and 1 if any value is inf or nan"
    ),
    consumes=(),
    rounding="fp32 products; sums in fp32 or wider, rounded to fp32; the order of summation depends on n only",
    tolerance=f"1e-6 relative for any n, by blocked or pairwise summation; {_SUBNORMAL}",
)

SCALE_CAST = KernelSchema(
    name="scale_cast",
    signature="(destination any float[n], source any float[n], scale f32[]) -> destination = cast(scale * source)",
    consumes=("destination",),
    rounding="product in fp32, then to nearest even in the dtype of destination",
    tolerance=f"exact; {_SUBNORMAL}",
)

POLAR = KernelSchema(
    name="polar",
    signature=(
        "(stack f32|bf16|f16[b, n, m], coefficients: tuple of (a, b, c), one per step, "
        "*, product_dtype: torch.dtype, f32 (the default)|bf16|f16) -> polar factors, as stack"
    ),
    consumes=(),
    rounding=(
        "scaling in fp32; factors of products are rounded to product_dtype and their terms added in fp32; what lies "
        "between products is of product_dtype or wider; the result is rounded to the dtype of stack"
    ),
    tolerance=(
        "of the error of U p(S) V^T in the Frobenius norm, for a matrix U S V^T divided by its norm and p the steps "
        "one after the other: what noise becomes by the slopes of the later steps if scaling adds 2 units in the last "
        "place of fp32 of S, and each step, spread evenly over the matrix, a unit of product_dtype and 2 of fp32 of "
        "|a| S + |b| S^3 + |c| S^5; half a unit of the result's dtype at last. Its largest singular value is within 4 "
        "units of the largest that p takes in [0, 1]. A zero matrix gives zeros, zero rows and columns stay zero, and "
        "a matrix with inf or nan gives nan and spoils no other of the stack"
    ),
)

SCHEMAS = (ADAMW, SQUARE_SUM, SCALE_CAST, POLAR)


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


def polar(stack: Tensor, coefficients: Coefficients, *, product_dtype: torch.dtype = torch.float32) -> Tensor:
    """The orthogonal polar factor of each matrix, approximated by Newton-Schulz in its standard form.

    A step is X <- a X + (b A + c A^2) X with A = X X^T on the smaller side. Matrices are scaled by their largest
    element before their norm is taken, which then neither overflows nor vanishes, however large or small they are.
    `windlass.accelerator.polar` has named coefficients; they are static, as is the dtype of the products.
    """
    x = stack.to(torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    if x.numel() == 0:
        return stack.clone()
    x = x / _unless_zero(x.abs().amax((-2, -1), keepdim=True))
    x = x / _unless_zero((x * x).sum((-2, -1), keepdim=True).sqrt())
    x = x.to(product_dtype)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(stack.dtype).contiguous()


def _unless_zero(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor)


def reference_kernels() -> tuple[Kernel, ...]:
    """All references, lowest priority."""
    return tuple(
        Kernel(name, REFERENCE, function, priority=0)
        for name, function in (
            ("adamw", adamw),
            ("square_sum", square_sum),
            ("scale_cast", scale_cast),
            ("polar", polar),
        )
    )
