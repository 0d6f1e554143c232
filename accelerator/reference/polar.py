"""Orthogonal polar factors by Newton-Schulz: on the matrix itself, and on its Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from windlass.accelerator.kernels import KernelSchema
from windlass.accelerator.polar import Coefficients, plan_restarts

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

POLAR_GRAM = KernelSchema(
    name="polar_gram",
    signature=(
        "(stack f32|bf16|f16[b, n, m], coefficients: tuple of (a, b, c), one per step, *, product_dtype: torch.dtype, "
        "f32 (the default)|f16, restarts: tuple of steps before which the Gram matrix is made anew, or None for "
        "`plan_restarts`) -> polar factors, as stack"
    ),
    consumes=(),
    rounding=POLAR.rounding,
    tolerance=(
        "of the error of U p(S) V^T in the Frobenius norm: as polar's, but with a quarter of a unit of product_dtype, "
        "which is what roundings come to in the mean, and such a quarter of S besides wherever the Gram matrix G is "
        "made. To this comes what the noise of G and of the product P of the steps since then is when P meets X, by "
        "the slopes of the product of the later steps as a function of G. Each step, spread evenly over the small "
        "matrix, adds to the noise of G a quarter of a unit of product_dtype and 2 of fp32 of "
        "(|a| + |b| S^2 + |c| S^4)^2 S^2, to that of P the same of (|a| + |b| S^2 + |c| S^4) P; a new G begins with a "
        "quarter of a unit of S^2 and 2 of fp32 of the sum of S^2. Zeros and what is not finite are as polar's"
    ),
)


def polar(stack: Tensor, coefficients: Coefficients, *, product_dtype: torch.dtype = torch.float32) -> Tensor:
    """The orthogonal polar factor of each matrix, approximated by Newton-Schulz in its standard form.

    A step is X <- a X + (b A + c A^2) X with A = X X^T on the smaller side. Matrices are scaled by their largest
    element before their norm is taken, which then neither overflows nor vanishes, however large or small they are.
    `windlass.accelerator.polar` has named coefficients; they are static, as is the dtype of the products.
    """
    if stack.numel() == 0:
        return stack.clone()
    x, tall = _normalize(stack)
    x = x.to(product_dtype)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(stack.dtype).contiguous()


def polar_gram(
    stack: Tensor,
    coefficients: Coefficients,
    *,
    product_dtype: torch.dtype = torch.float32,
    restarts: tuple[int, ...] | None = None,
) -> Tensor:
    """The same steps, taken on the Gram matrix G = X X^T: X <- Q X turns G into Q G Q, where Q = a I + b G + c G^2.

    The product P of all Q meets X only before a restart and at the end, so a matrix that is much longer than high
    costs less. All small matrices are symmetric and commute, which an implementation may use. Rounding errors in G
    grow by a^2 a step where X is small: a restart computes X and G anew (Dao et al. 2026, "Gram Newton-Schulz").
    """
    require_gram_dtype(product_dtype)
    if stack.numel() == 0:
        return stack.clone()
    if restarts is None:
        restarts = plan_restarts(coefficients, torch.finfo(product_dtype).eps)
    x, tall = _normalize(stack)
    gram, product = None, None  # of the steps since the last restart
    for step, (a, b, c) in enumerate(coefficients):
        if step in restarts and product is not None:
            x, gram, product = _multiply(product, x, product_dtype), None, None
        gram = _multiply(x, x.mT, product_dtype) if gram is None else gram
        rest = b * gram + c * _multiply(gram, gram, product_dtype)  # Q = a I + rest
        if product is None:
            product = rest + a * torch.eye(rest.shape[-1], dtype=rest.dtype, device=rest.device)
        else:
            product = a * product + _multiply(rest, product, product_dtype)
        if step + 1 < len(coefficients) and step + 1 not in restarts:
            once = a * gram + _multiply(rest, gram, product_dtype)
            gram = a * once + _multiply(rest, once, product_dtype)
    x = x if product is None else _multiply(product, x, product_dtype)
    return (x.mT if tall else x).to(stack.dtype).contiguous()


def require_gram_dtype(product_dtype: torch.dtype) -> None:
    """Raise ValueError for a dtype in which the Gram form is not safe: its noise would become singular values."""
    if product_dtype not in (torch.float32, torch.float16):
        raise ValueError(
            f"kernel 'polar_gram' got products in {product_dtype}, wanted float32 or float16, whose rounding errors "
            f"the Gram form does not lift to singular values; use 'polar'"
        )


def _normalize(stack: Tensor) -> tuple[Tensor, bool]:
    """In fp32, no higher than long, and of norm 1, by its largest element first; and whether that transposed it."""
    x = stack.to(torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / _unless_zero(x.abs().amax((-2, -1), keepdim=True))
    return x / _unless_zero((x * x).sum((-2, -1), keepdim=True).sqrt()), tall


def _multiply(left: Tensor, right: Tensor, product_dtype: torch.dtype) -> Tensor:
    """A product in fp32 of factors that are rounded to `product_dtype`."""
    return left.to(product_dtype).to(torch.float32) @ right.to(product_dtype).to(torch.float32)


def _unless_zero(divisor: Tensor) -> Tensor:
    return torch.where(divisor == 0, torch.ones_like(divisor), divisor)
