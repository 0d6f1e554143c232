"""Muon's two passes over a vector on the processor; see `windlass.backends.cpu.kernels` for how they are compiled."""

from __future__ import annotations

import numpy as np
from numba import njit, types
from torch import Tensor

from windlass.accelerator.reference import SCALE_DECAY_SCALARS
from windlass.accelerator.reference.momentum import require_noise
from windlass.backends.cpu.bits import bytes_at, floats_at, halves_at, integers_at
from windlass.backends.cpu.noise import round_vector
from windlass.backends.cpu.vectors import (
    ADDRESS,
    ANY,
    BLOCK,
    BOOL,
    FLOAT,
    KIND_FLOAT,
    KIND_NONE,
    KINDS,
    LONG,
    NARROW,
    WIDE_OR_BFLOAT16,
    address_of,
    narrow_vector,
    widen_vector,
)


@njit(
    types.void(*[ADDRESS] * 7, types.int64, types.int64, types.int64, types.int64, types.boolean),
    nogil=True,
    cache=True,
    error_model="numpy",
)
def _momentum_blend(
    momentum_at: int,
    gradient_at: int,
    blended_at: int,
    scalars_at: int,
    gradient_scale_at: int,
    keep_at: int,
    noise_at: int,
    count: int,
    momentum_kind: int,
    gradient_kind: int,
    blended_kind: int,
    nesterov: bool,
) -> None:
    momentum_width = 4 if momentum_kind == KIND_FLOAT else 2
    gradient_width = 4 if gradient_kind == KIND_FLOAT else 2
    blended_width = 4 if blended_kind == KIND_FLOAT else 2
    if bytes_at(keep_at)[0] == 0:
        if blended_kind == KIND_FLOAT:
            zeros = floats_at(blended_at)
            for i in range(count):
                zeros[i] = np.float32(0)
        else:
            halves = halves_at(blended_at)
            for i in range(count):
                halves[i] = np.uint16(0)
        return
    scalars = floats_at(scalars_at)
    mu, rest = scalars[0], scalars[1]
    scale = floats_at(gradient_scale_at)[0]
    momenta, gradients, blends = (np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32))
    for begin in range(0, count, BLOCK):
        size = min(BLOCK, count - begin)
        if momentum_kind == KIND_FLOAT:
            momentum = floats_at(momentum_at + 4 * begin)
        else:
            widen_vector(momenta.ctypes.data, momentum_at + momentum_width * begin, size, momentum_kind)
            momentum = floats_at(momenta.ctypes.data)
        if gradient_kind == KIND_FLOAT:
            gradient = floats_at(gradient_at + 4 * begin)
        else:
            widen_vector(gradients.ctypes.data, gradient_at + gradient_width * begin, size, gradient_kind)
            gradient = floats_at(gradients.ctypes.data)
        blended = floats_at(blended_at + 4 * begin) if blended_kind == KIND_FLOAT else floats_at(blends.ctypes.data)
        if nesterov:
            for i in range(size):
                g = gradient[i] * scale
                m = momentum[i]
                m = m + rest * (g - m)
                momentum[i] = m
                blended[i] = g + mu * (m - g)
        else:
            for i in range(size):
                m = momentum[i]
                m = m + rest * (gradient[i] * scale - m)
                momentum[i] = m
                blended[i] = m
        if momentum_kind != KIND_FLOAT:
            noise = integers_at(noise_at)
            round_vector(momentum_at + 2 * begin, momenta.ctypes.data, size, noise[0], noise[1] + begin)
        if blended_kind != KIND_FLOAT:
            narrow_vector(blended_at + blended_width * begin, blends.ctypes.data, size, blended_kind)


@njit(
    types.void(*[ADDRESS] * 5, types.int64, types.int64, types.int64),
    nogil=True,
    cache=True,
    error_model="numpy",
)
def _scale_decay_update(
    weight_at: int,
    direction_at: int,
    scalars_at: int,
    keep_at: int,
    low_at: int,
    count: int,
    direction_kind: int,
    low_kind: int,
) -> None:
    if bytes_at(keep_at)[0] == 0:
        return
    scalars = floats_at(scalars_at)
    shrink = np.float32(1) - scalars[0] * scalars[1]  # as SCALE_DECAY_SCALARS names them
    step = scalars[0] * scalars[2]
    scratch = np.empty(BLOCK, np.float32)
    for begin in range(0, count, BLOCK):
        size = min(BLOCK, count - begin)
        weight = floats_at(weight_at + 4 * begin)
        if direction_kind == KIND_FLOAT:
            direction = floats_at(direction_at + 4 * begin)
        else:
            widen_vector(scratch.ctypes.data, direction_at + 2 * begin, size, direction_kind)
            direction = floats_at(scratch.ctypes.data)
        for i in range(size):
            weight[i] = weight[i] * shrink - step * direction[i]
        if low_kind != KIND_NONE:
            narrow_vector(low_at + 2 * begin, weight_at + 4 * begin, size, low_kind)


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
    """Momentum and Nesterov's blend in one pass; see `reference.momentum_blend`."""
    require_noise(momentum, noise)
    count, name = momentum.numel(), "momentum_blend"
    _momentum_blend(
        address_of(name, "momentum", momentum, WIDE_OR_BFLOAT16, count),
        address_of(name, "gradient", gradient, ANY, count),
        address_of(name, "blended", blended, ANY, count),
        address_of(name, "scalars", scalars, FLOAT, 2),
        address_of(name, "gradient_scale", gradient_scale, FLOAT, 1),
        address_of(name, "keep", keep, BOOL, 1),
        0 if noise is None else address_of(name, "noise", noise, LONG, 2),
        count,
        KINDS[momentum.dtype],
        KINDS[gradient.dtype],
        KINDS[blended.dtype],
        nesterov,
    )
    return momentum, blended


def scale_decay_update(
    weight: Tensor, direction: Tensor, scalars: Tensor, keep: Tensor, low: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """One decayed step along a direction, in place; see `reference.scale_decay_update`."""
    count, name = weight.numel(), "scale_decay_update"
    _scale_decay_update(
        address_of(name, "weight", weight, FLOAT, count),
        address_of(name, "direction", direction, ANY, count),
        address_of(name, "scalars", scalars, FLOAT, len(SCALE_DECAY_SCALARS)),
        address_of(name, "keep", keep, BOOL, 1),
        0 if low is None else address_of(name, "low", low, NARROW, count),
        count,
        KINDS[direction.dtype],
        KIND_NONE if low is None else KINDS[low.dtype],
    )
    return weight, low
