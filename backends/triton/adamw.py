"""AdamW in one pass over memory, with moments of fp32 or of bf16.

Each operation is rounded on its own, in the order of the reference, so that neither slicing nor the device changes a
bit. Numbers that change from step to step are read from the device by each program.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from windlass.accelerator.kernels import Kernel
from windlass.accelerator.reference.adamw import ADAMW_SCALARS, Updated
from windlass.backends.triton.launch import (
    IMPLEMENTATION,
    TYPE_NAMES,
    Variant,
    launch_over,
    make_vector_variant,
    require,
)
from windlass.backends.triton.numbers import make_noise, round_stochastically, round_to, widen

BLOCK: Final = 1024
WARPS: Final = 4
_WIDE: Final = tl.constexpr(4)
"""Elements that a thread takes side by side: 16 bytes of fp32. Left alone, Triton would count in 16-bit elements, and a
thread would write each 32-byte sector of fp32 in two halves."""


@triton.jit
def update_block(
    weight: tl.tensor,
    gradient: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    low: tl.tensor,
    scalars: tl.tensor,
    gradient_scale: tl.tensor,
    keep: tl.tensor,
    noise: tl.tensor,
    start: tl.tensor,
    rest: tl.tensor,
    DECOUPLED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Update BLOCK elements, or `rest` of them where MASKED, from where the pointers point on.

    That is element `start` of its vector. `low` and `noise` are None or pointers.
    """
    at = tl.max_contiguous(tl.arange(0, BLOCK), _WIDE)
    mask = at < rest if MASKED else None
    before = tl.load(weight + at, mask=mask)
    g = widen(tl.load(gradient + at, mask=mask))
    m = widen(tl.load(exp_avg + at, mask=mask))
    v = widen(tl.load(exp_avg_sq + at, mask=mask))
    lr = tl.load(scalars)
    rest1, beta2, rest2 = tl.load(scalars + 2), tl.load(scalars + 3), tl.load(scalars + 4)
    eps, decay = tl.load(scalars + 5), tl.load(scalars + 6)
    step = tl.div_rn(lr, tl.load(scalars + 7))
    root2 = tl.sqrt_rn(tl.load(scalars + 8))
    g = g * tl.load(gradient_scale)
    w = before
    if DECOUPLED:
        w = before * (1 - lr * decay)
    else:
        g = g + decay * before
    m = m + rest1 * (g - m)
    v = beta2 * v + rest2 * (g * g)
    w = w - step * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root2) + eps)
    if tl.load(keep):
        tl.store(weight + at, w, mask=mask)
        if noise is None:
            tl.store(exp_avg + at, m, mask=mask)
            tl.store(exp_avg_sq + at, v, mask=mask)
        else:
            chance = make_noise(tl.load(noise), tl.load(noise + 1) + start, at)
            tl.store(exp_avg + at, round_stochastically(m, chance & 0xFFFF), mask=mask)
            tl.store(exp_avg_sq + at, round_stochastically(v, chance >> 16), mask=mask)
        if low is not None:
            tl.store(low + at, round_to(w, low.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def update_vector(
    weight: tl.tensor,
    gradient: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    low: tl.tensor,
    scalars: tl.tensor,
    gradient_scale: tl.tensor,
    keep: tl.tensor,
    noise: tl.tensor,
    count: tl.tensor,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of a vector. Only the last goes by a mask, which would keep threads from moving 16 bytes at once."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    rest = count - start
    weight += start
    gradient += start
    exp_avg += start
    exp_avg_sq += start
    if low is not None:
        low += start
    if rest >= BLOCK:
        update_block(
            weight, gradient, exp_avg, exp_avg_sq, low, scalars, gradient_scale, keep, noise, start, rest,
            DECOUPLED, False, BLOCK,
        )  # fmt: skip
    else:
        update_block(
            weight, gradient, exp_avg, exp_avg_sq, low, scalars, gradient_scale, keep, noise, start, rest,
            DECOUPLED, True, BLOCK,
        )  # fmt: skip


@cache
def make_variant(
    gradient: torch.dtype, moments: torch.dtype, low: torch.dtype | None, decoupled: bool, *, aligned: bool = True
) -> Variant:
    """The program for one combination of dtypes."""
    return make_vector_variant(
        f"adamw of {TYPE_NAMES[gradient]} gradients, {TYPE_NAMES[moments]} moments, "
        f"{'no' if low is None else TYPE_NAMES[low]} low copies{'' if decoupled else ', L2'}",
        update_vector,
        {"weight": torch.float32, "gradient": gradient, "exp_avg": moments, "exp_avg_sq": moments, "low": low},
        {
            "scalars": "*fp32",
            "gradient_scale": "*fp32",
            "keep": "*u1",
            "noise": "*i64" if moments is torch.bfloat16 else None,
        },
        {"DECOUPLED": decoupled, "BLOCK": BLOCK},
        num_warps=WARPS,
        aligned=aligned,
    )


_NARROW: Final = (torch.bfloat16, torch.float16)
_ANY: Final = (torch.float32, *_NARROW)

VARIANTS: tuple[Variant, ...] = (
    *(
        make_variant(gradient, moments, low, True)
        for moments in (torch.float32, torch.bfloat16)
        for gradient in _ANY
        for low in (None, *_NARROW)
    ),
    make_variant(torch.bfloat16, torch.float32, torch.bfloat16, False),
    make_variant(torch.bfloat16, torch.float32, torch.bfloat16, True, aligned=False),
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
    """One AdamW update in place; see `reference.adamw`."""
    vectors = (weight, gradient, exp_avg, exp_avg_sq, low)
    _update("adamw", torch.float32, vectors, scalars, gradient_scale, keep, None, decoupled)
    return weight, exp_avg, exp_avg_sq, low


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
    """One AdamW update in place with moments of bf16; see `reference.adamw_bf16_moments`."""
    vectors = (weight, gradient, exp_avg, exp_avg_sq, low)
    _update("adamw_bf16_moments", torch.bfloat16, vectors, scalars, gradient_scale, keep, noise, decoupled)
    return weight, exp_avg, exp_avg_sq, low


def require_vectors(
    kernel: str, moments: torch.dtype, vectors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
) -> None:
    """Raise ValueError unless weight, gradient, moments and low fit together."""
    weight, gradient, exp_avg, exp_avg_sq, low = vectors
    count = weight.numel()
    require(kernel, "weight", weight, (torch.float32,), count)
    require(kernel, "gradient", gradient, _ANY, count)
    require(kernel, "exp_avg", exp_avg, (moments,), count)
    require(kernel, "exp_avg_sq", exp_avg_sq, (moments,), count)
    if low is not None:
        require(kernel, "low", low, _NARROW, count)


def _update(
    kernel: str,
    moments: torch.dtype,
    vectors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    scalars: Tensor,
    gradient_scale: Tensor,
    keep: Tensor,
    noise: Tensor | None,
    decoupled: bool,
) -> None:
    require_vectors(kernel, moments, vectors)
    require(kernel, "scalars", scalars, (torch.float32,), len(ADAMW_SCALARS))
    require(kernel, "gradient_scale", gradient_scale, (torch.float32,), 1)
    require(kernel, "keep", keep, (torch.bool,), 1)
    if noise is not None:
        require(kernel, "noise", noise, (torch.int64,), 2)
    weight, gradient, exp_avg, exp_avg_sq, low = vectors
    launch_over(
        make_variant(gradient.dtype, moments, None if low is None else low.dtype, decoupled),
        weight.numel(),
        weight.device,
        weight=weight,
        gradient=gradient,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        low=low,
        scalars=scalars,
        gradient_scale=gradient_scale,
        keep=keep,
        noise=noise,
    )


KERNELS: tuple[Kernel, ...] = (
    Kernel("adamw", IMPLEMENTATION, adamw),
    Kernel("adamw_bf16_moments", IMPLEMENTATION, adamw_bf16_moments),
)
