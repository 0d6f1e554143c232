"""Muon's two passes over a vector, each rounded operation by operation as the reference is.

`momentum_blend` comes before orthogonalisation, `scale_decay_update` after it.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from windlass.accelerator.kernels import Kernel
from windlass.accelerator.reference.momentum import SCALE_DECAY_SCALARS, require_noise
from windlass.backends.triton.launch import (
    IMPLEMENTATION,
    TYPE_NAMES,
    Variant,
    launch_over,
    make_vector_variant,
    require,
)
from windlass.backends.triton.numbers import make_noise, round_stochastically, round_to, widen

BLOCK: Final = 2048
WARPS: Final = 4
_WIDE: Final = tl.constexpr(4)  # elements side by side in a thread, as in adamw
_NARROW: Final = (torch.bfloat16, torch.float16)
_ANY: Final = (torch.float32, *_NARROW)


@triton.jit
def _blend_block(
    momentum: tl.tensor,
    gradient: tl.tensor,
    blended: tl.tensor,
    scalars: tl.tensor,
    gradient_scale: tl.tensor,
    keep: tl.tensor,
    noise: tl.tensor,
    start: tl.tensor,
    rest: tl.tensor,
    NESTEROV: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.max_contiguous(tl.arange(0, BLOCK), _WIDE)
    mask = at < rest if MASKED else None
    before = widen(tl.load(momentum + at, mask=mask))
    g = widen(tl.load(gradient + at, mask=mask)) * tl.load(gradient_scale)
    after = before + tl.load(scalars + 1) * (g - before)
    direction = after
    if NESTEROV:
        direction = g + tl.load(scalars) * (after - g)
    if tl.load(keep):
        if noise is None:
            tl.store(momentum + at, after, mask=mask)
        else:
            chance = make_noise(tl.load(noise), tl.load(noise + 1) + start, at)
            tl.store(momentum + at, round_stochastically(after, chance & 0xFFFF), mask=mask)
        tl.store(blended + at, round_to(direction, blended.dtype.element_ty), mask=mask)
    else:
        nothing = tl.zeros([BLOCK], tl.float32)
        tl.store(blended + at, round_to(nothing, blended.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def blend_vector(
    momentum: tl.tensor,
    gradient: tl.tensor,
    blended: tl.tensor,
    scalars: tl.tensor,
    gradient_scale: tl.tensor,
    keep: tl.tensor,
    noise: tl.tensor,
    count: tl.tensor,
    NESTEROV: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of `momentum_blend`; `noise` is None for a momentum of fp32."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    rest = count - start
    momentum += start
    gradient += start
    blended += start
    if rest >= BLOCK:
        _blend_block(
            momentum, gradient, blended, scalars, gradient_scale, keep, noise, start, rest, NESTEROV, False, BLOCK
        )
    else:
        _blend_block(
            momentum, gradient, blended, scalars, gradient_scale, keep, noise, start, rest, NESTEROV, True, BLOCK
        )


@triton.jit
def _decay_block(
    weight: tl.tensor,
    direction: tl.tensor,
    scalars: tl.tensor,
    keep: tl.tensor,
    low: tl.tensor,
    rest: tl.tensor,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    at = tl.max_contiguous(tl.arange(0, BLOCK), _WIDE)
    mask = at < rest if MASKED else None
    before = tl.load(weight + at, mask=mask)
    change = widen(tl.load(direction + at, mask=mask))
    lr = tl.load(scalars)
    new = before * (1 - lr * tl.load(scalars + 1)) - (lr * tl.load(scalars + 2)) * change
    if tl.load(keep):
        tl.store(weight + at, new, mask=mask)
        if low is not None:
            tl.store(low + at, round_to(new, low.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def decay_vector(
    weight: tl.tensor,
    direction: tl.tensor,
    scalars: tl.tensor,
    keep: tl.tensor,
    low: tl.tensor,
    count: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """One block of `scale_decay_update`; `low` is a pointer or None."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    rest = count - start
    weight += start
    direction += start
    if low is not None:
        low += start
    if rest >= BLOCK:
        _decay_block(weight, direction, scalars, keep, low, rest, False, BLOCK)
    else:
        _decay_block(weight, direction, scalars, keep, low, rest, True, BLOCK)


@cache
def make_blend_variant(
    momentum: torch.dtype, gradient: torch.dtype, blended: torch.dtype, nesterov: bool, *, aligned: bool = True
) -> Variant:
    """The program of `momentum_blend` for one combination of dtypes."""
    return make_vector_variant(
        f"momentum_blend of {TYPE_NAMES[momentum]} momentum, {TYPE_NAMES[gradient]} gradients, into "
        f"{TYPE_NAMES[blended]}{'' if nesterov else ', plain'}",
        blend_vector,
        {"momentum": momentum, "gradient": gradient, "blended": blended},
        {
            "scalars": "*fp32",
            "gradient_scale": "*fp32",
            "keep": "*u1",
            "noise": "*i64" if momentum is torch.bfloat16 else None,
        },
        {"NESTEROV": nesterov, "BLOCK": BLOCK},
        num_warps=WARPS,
        aligned=aligned,
    )


@cache
def make_decay_variant(direction: torch.dtype, low: torch.dtype | None, *, aligned: bool = True) -> Variant:
    """The program of `scale_decay_update` for one combination of dtypes."""
    return make_vector_variant(
        f"scale_decay_update by {TYPE_NAMES[direction]}, {'no' if low is None else TYPE_NAMES[low]} low copies",
        decay_vector,
        {"weight": torch.float32, "direction": direction, "low": low},
        {"scalars": "*fp32", "keep": "*u1"},
        {"BLOCK": BLOCK},
        num_warps=WARPS,
        aligned=aligned,
    )


VARIANTS: tuple[Variant, ...] = (
    *(
        make_blend_variant(momentum, gradient, blended, True)
        for momentum in (torch.float32, torch.bfloat16)
        for gradient in _ANY
        for blended in _ANY
    ),
    make_blend_variant(torch.float32, torch.bfloat16, torch.bfloat16, False),
    make_blend_variant(torch.float32, torch.bfloat16, torch.bfloat16, True, aligned=False),
    *(make_decay_variant(direction, low) for direction in _ANY for low in (None, *_NARROW)),
    make_decay_variant(torch.bfloat16, torch.bfloat16, aligned=False),
)


def momentum_blend(
    momentum: Tensor,
    gradient: Tensor,
    blended: Tensor,
    scalars: Tensor,
    gradient_scale: Tensor,
    keep: Tensor,
    noise: Tensor | None = None,
    *,
    nesterov: bool = True,
) -> tuple[Tensor, Tensor]:
    """Momentum in place, and what is to be orthogonalised; see `reference.momentum_blend`."""
    kernel, count = "momentum_blend", momentum.numel()
    require(kernel, "momentum", momentum, (torch.float32, torch.bfloat16), count)
    require(kernel, "gradient", gradient, _ANY, count)
    require(kernel, "blended", blended, _ANY, count)
    require(kernel, "scalars", scalars, (torch.float32,), 2)
    require(kernel, "gradient_scale", gradient_scale, (torch.float32,), 1)
    require(kernel, "keep", keep, (torch.bool,), 1)
    require_noise(momentum, noise)
    if noise is not None:
        require(kernel, "noise", noise, (torch.int64,), 2)
    launch_over(
        make_blend_variant(momentum.dtype, gradient.dtype, blended.dtype, nesterov),
        count,
        momentum.device,
        momentum=momentum,
        gradient=gradient,
        blended=blended,
        scalars=scalars,
        gradient_scale=gradient_scale,
        keep=keep,
        noise=noise,
    )
    return momentum, blended


def scale_decay_update(
    weight: Tensor, direction: Tensor, scalars: Tensor, keep: Tensor, low: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """A weight moved along a direction and decayed, in place; see `reference.scale_decay_update`."""
    kernel, count = "scale_decay_update", weight.numel()
    require(kernel, "weight", weight, (torch.float32,), count)
    require(kernel, "direction", direction, _ANY, count)
    require(kernel, "scalars", scalars, (torch.float32,), len(SCALE_DECAY_SCALARS))
    require(kernel, "keep", keep, (torch.bool,), 1)
    if low is not None:
        require(kernel, "low", low, _NARROW, count)
    launch_over(
        make_decay_variant(direction.dtype, None if low is None else low.dtype),
        count,
        weight.device,
        weight=weight,
        direction=direction,
        scalars=scalars,
        keep=keep,
        low=low,
    )
    return weight, low


KERNELS: tuple[Kernel, ...] = (
    Kernel("momentum_blend", IMPLEMENTATION, momentum_blend),
    Kernel("scale_decay_update", IMPLEMENTATION, scale_decay_update),
)
