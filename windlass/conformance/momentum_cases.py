"""Arguments for momentum_blend and scale_decay_update, and what each result should be in higher precision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.conformance.allocations import assert_holds, bring
from windlass.conformance.kernel_cases import KEEP, ONE, Doubles, ulp
from windlass.conformance.kernel_runs import KernelFunction
from windlass.conformance.noise_cases import Noise, enclose


@dataclass
class Blend:
    """The vectors of momentum_blend."""

    momentum: Tensor
    gradient: Tensor
    blended: Tensor

    def slice(self, begin: int, end: int) -> Blend:
        """Views of a part, where it lies."""
        return Blend(self.momentum[begin:end], self.gradient[begin:end], self.blended[begin:end])

    def on(self, accelerator: Accelerator) -> Blend:
        """Copies on the device."""
        return Blend(*(bring(accelerator, each) for each in (self.momentum, self.gradient, self.blended)))

    def fetch(self, accelerator: Accelerator) -> Blend:
        """Copies on the host."""
        return Blend(*(accelerator.to_host(each) for each in (self.momentum, self.gradient, self.blended)))


def make_blend(
    count: int,
    momentum: torch.dtype = torch.float32,
    gradient: torch.dtype = torch.float32,
    blended: torch.dtype = torch.float32,
) -> Blend:
    """Gradients of many magnitudes, and a momentum of their size; `blended` has nothing to say."""
    random = torch.Generator().manual_seed(11)
    spread = 10 ** (2 * torch.randn(count, generator=random)).clamp(-3, 3)
    values = [spread * torch.randn(count, generator=random) for _ in range(2)]
    return Blend(values[0].to(momentum), values[1].to(gradient), torch.full((count,), 7.0, dtype=blended))


def blend_scalars(mu: float) -> Tensor:
    """The `scalars` vector of momentum_blend."""
    return torch.tensor([mu, 1 - mu], dtype=torch.float32)


def blend_on(
    accelerator: Accelerator,
    kernel: KernelFunction,
    vectors: Blend,
    mu: float,
    scale: Tensor = ONE,
    keep: Tensor = KEEP,
    noise: Noise | None = None,
    *,
    nesterov: bool = True,
) -> None:
    """Run momentum_blend on vectors of the device and keep what it returns."""
    scalars, scale, keep = (bring(accelerator, each) for each in (blend_scalars(mu), scale, keep))
    chance = None if noise is None else bring(accelerator, noise.tensor())
    results = kernel(
        vectors.momentum, vectors.gradient, vectors.blended, scalars, scale, keep, chance, nesterov=nesterov
    )
    vectors.momentum, vectors.blended = results
    assert_holds(accelerator, scalars, blend_scalars(mu), "scalars, which momentum_blend does not consume,")
    if noise is not None and chance is not None:
        assert_holds(accelerator, chance, noise.tensor(), "noise, which momentum_blend does not consume,")


def run_blend(
    accelerator: Accelerator,
    kernel: KernelFunction,
    vectors: Blend,
    mu: float,
    scale: Tensor = ONE,
    keep: Tensor = KEEP,
    noise: Noise | None = None,
    *,
    nesterov: bool = True,
) -> Blend:
    """The vectors after momentum_blend on the device, back on the host. The gradient must be as it was."""
    on_device = vectors.on(accelerator)
    blend_on(accelerator, kernel, on_device, mu, scale, keep, noise, nesterov=nesterov)
    found = on_device.fetch(accelerator)
    assert_holds(accelerator, on_device.gradient, vectors.gradient, "the gradient, which is not consumed,")
    assert (found.momentum.dtype, found.blended.dtype) == (vectors.momentum.dtype, vectors.blended.dtype)
    return found


Interval = tuple[Doubles, Doubles]
"""A result in float64, and how far from it an implementation may be."""


def bound_blend(
    vectors: Blend, mu: float, scale: Tensor, *, nesterov: bool, vanishing: float = 0.0
) -> tuple[Interval, Interval]:
    """The momentum before it is rounded to 16 bits, and the blend before it is. `vanishing` is the number below which
    the device may take a term of a sum for zero."""
    factor, rest = blend_scalars(mu).double().tolist()
    gradient = vectors.gradient.double().numpy() * scale.double().item()
    before = vectors.momentum.double().numpy()
    after = before + rest * (gradient - before)
    size = np.maximum(np.abs(before), rest * np.maximum(np.abs(gradient), np.abs(before)))
    allowed = 4 * ulp(size) + 3 * vanishing
    if not nesterov:
        return (after, allowed), (after, allowed)
    largest = np.maximum(np.abs(gradient), factor * np.maximum(np.abs(after), np.abs(gradient)))
    blend = gradient + factor * (after - gradient)
    return (after, allowed), (blend, 4 * ulp(largest) + factor * allowed + 3 * vanishing)


def bound_update(weight: Tensor, direction: Tensor, scalars: Tensor, *, vanishing: float = 0.0) -> Interval:
    """The new weight of scale_decay_update."""
    lr, decay, scale = scalars.double().tolist()
    shrunk = weight.double().numpy() * (1 - lr * decay)
    moved = lr * scale * direction.double().numpy()
    size = np.maximum(np.maximum(np.abs(shrunk), np.abs(weight.double().numpy())), np.abs(moved))
    return shrunk - moved, 4 * ulp(size) + 3 * vanishing


def count_beyond(found: Tensor, interval: Interval) -> int:
    """Elements that are no rounding to nearest, in the dtype of `found`, of any number of the interval."""
    low, high = (torch.from_numpy(end).to(found.dtype).double() for end in enclose(*interval))
    value = found.double()
    return int((~((low <= value) & (value <= high))).sum())
