"""Arguments for the kernels, and what each result should be in higher precision, written without the package."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Doubles = npt.NDArray[np.float64]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONE = torch.tensor(1.0)
KEEP, SKIP = torch.tensor(True), torch.tensor(False)


def make_scalars(
    step: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> Tensor:
    """The `scalars` vector of adamw at a step counted from 1."""
    first, second = betas
    values = (lr, first, 1 - first, second, 1 - second, eps, weight_decay, 1 - first**step, 1 - second**step)
    return torch.tensor(values, dtype=torch.float32)


@dataclass
class AdamwState:
    """The vectors of one update."""

    weight: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    low: Tensor | None

    def copy(self) -> AdamwState:
        return AdamwState(*(None if each is None else each.clone() for each in self._tensors()))  # type: ignore[arg-type]

    def slice(self, begin: int, end: int) -> AdamwState:
        """Views of a part, where it lies."""
        return AdamwState(*(None if each is None else each[begin:end] for each in self._tensors()))  # type: ignore[arg-type]

    def on(self, device: torch.device) -> AdamwState:
        """Copies on a device."""
        moved = (None if each is None else each.to(device, copy=True) for each in self._tensors())
        return AdamwState(*moved)  # type: ignore[arg-type]

    def fetch(self, to_host: Callable[[Tensor], Tensor]) -> AdamwState:
        """Copies on the host."""
        fetched = (None if each is None else to_host(each) for each in self._tensors())
        return AdamwState(*fetched)  # type: ignore[arg-type]

    def bits(self) -> list[list[int]]:
        """Every vector as integers; equal lists are equal bits."""
        return [each.view(WORDS[each.itemsize]).tolist() for each in self._tensors() if each is not None]

    def update(
        self, adamw: Any, scalars: Tensor, scale: Tensor = ONE, keep: Tensor = KEEP, *, decoupled: bool = True
    ) -> None:
        """Run the kernel on these vectors and keep what it returns."""
        results = adamw(
            self.weight,
            self.gradient,
            self.exp_avg,
            self.exp_avg_sq,
            scalars,
            scale,
            keep,
            self.low,
            decoupled=decoupled,
        )
        self.weight, self.exp_avg, self.exp_avg_sq, self.low = results

    def _tensors(self) -> list[Tensor | None]:
        return [getattr(self, each.name) for each in fields(self)]


WORDS = {2: torch.int16, 4: torch.int32}


def make_state(
    count: int, gradient: torch.dtype = torch.float32, low: torch.dtype | None = torch.bfloat16, seed: int = 0
) -> AdamwState:
    """Weights near 0.1, gradients and moments of many magnitudes, as in the middle of a training."""
    random = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(count, generator=random)

    spread = 10 ** (2 * normal()).clamp(-3, 3)
    return AdamwState(
        weight=0.1 * normal(),
        gradient=(spread * normal()).clamp(-6e4, 6e4).to(gradient),
        exp_avg=0.3 * spread * normal(),
        exp_avg_sq=(spread * normal()) ** 2,
        low=None if low is None else torch.full((count,), 7.0, dtype=low),
    )


@dataclass(frozen=True)
class AdamwBounds:
    """Results in float64, and how far from each an implementation may be."""

    weight: tuple[Doubles, Doubles]
    exp_avg: tuple[Doubles, Doubles]
    exp_avg_sq: tuple[Doubles, Doubles]


def ulp(values: Doubles) -> Doubles:
    """The spacing of fp32 at each value."""
    return np.spacing(np.abs(values).astype(np.float32)).astype(np.float64)


def bound_adamw(
    state: AdamwState, scalars: Tensor, scale: Tensor, *, decoupled: bool, vanishing: float = 0.0
) -> AdamwBounds:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) in float64, from the same fp32 arguments.

    `vanishing` is the number below which the device may take a term of a sum for zero.
    """
    lr, _, rest1, beta2, rest2, eps, decay, correction1, correction2 = scalars.double().tolist()
    w, g, m, v = (each.double().numpy() for each in (state.weight, state.gradient, state.exp_avg, state.exp_avg_sq))
    g = g * scale.double().item()
    gradient_terms = np.abs(g)
    if not decoupled:
        gradient_terms = gradient_terms + np.abs(decay * w)
        g = g + decay * w
    new_m = m + rest1 * (g - m)
    new_v = beta2 * v + rest2 * g * g
    size_m = np.maximum(np.abs(m), rest1 * gradient_terms)
    size_v = np.maximum(new_v, rest2 * gradient_terms**2)  # with l2 the gradient may itself cancel
    denominator = np.sqrt(new_v) / np.sqrt(correction2) + eps
    step = lr / correction1 / denominator
    new_w = w * (1 - lr * decay * decoupled) - step * new_m
    size_update = step * size_m * np.sqrt(size_v / np.maximum(new_v, 1e-300))
    return AdamwBounds(
        weight=(new_w, 4 * ulp(np.maximum(np.abs(w), np.abs(new_w))) + 16 * ulp(size_update) + 3 * vanishing),
        exp_avg=(new_m, 4 * ulp(size_m) + 3 * vanishing),
        exp_avg_sq=(new_v, 4 * ulp(size_v) + 3 * vanishing),
    )


def measure_adamw(found: AdamwState, bounds: AdamwBounds) -> dict[str, float]:
    """The worst error of each result, as a share of what is allowed; nan where a result is none."""
    shares = {}
    for name in ("weight", "exp_avg", "exp_avg_sq"):
        wanted, allowed = getattr(bounds, name)
        error = np.abs(getattr(found, name).double().numpy() - wanted)
        shares[name] = float(np.max(error / allowed, initial=0.0))
    return shares


def adamw_rounded_stepwise(
    state: AdamwState, scalars: Tensor, scale: Tensor, *, decoupled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, exp_avg and exp_avg_sq, each operation rounded to fp32 by IEEE 754, in the order of the reference."""
    lr, _, rest1, beta2, rest2, eps, decay, correction1, correction2 = scalars.numpy()
    w, g, m, v = (each.float().numpy() for each in (state.weight, state.gradient, state.exp_avg, state.exp_avg_sq))
    with np.errstate(all="ignore"):
        g = g * scale.numpy()
        if not decoupled:
            g = g + decay * w
        m = m + rest1 * (g - m)
        v = beta2 * v + rest2 * (g * g)
        if decoupled:
            w = w * (np.float32(1) - lr * decay)
        w = w - (lr / correction1) * (m / (np.sqrt(v) / np.sqrt(correction2) + eps))
    return torch.from_numpy(w), torch.from_numpy(m), torch.from_numpy(v)


def count_different(left: Tensor, right: Tensor) -> int:
    """Elements with other bits, unless both are nan: the payload of a nan is nobody's business."""
    same = left.view(WORDS[left.itemsize]) == right.view(WORDS[right.itemsize])
    return int((~(same | (left.isnan() & right.isnan()))).sum())


def is_subnormal(values: Tensor) -> Tensor:
    """Whether each float32 is neither zero nor as large as 2^-126, told by its bits: a host may flush them too."""
    magnitude = values.view(torch.int32) & 0x7FFFFFFF
    return (magnitude > 0) & (magnitude < 0x00800000)


def accept_zeros(wanted: Tensor, found: Tensor, where: Tensor) -> Tensor:
    """What is wanted, but a zero of its sign where that is found and allowed."""
    words = WORDS[wanted.itemsize]
    sign = torch.iinfo(words).min
    zero = wanted.view(words) & sign
    return torch.where(where & (found.view(words) == zero), zero, wanted.view(words)).view(wanted.dtype)


def equal_bits(left: Tensor, right: Tensor) -> bool:
    """The same bits, or a nan in both."""
    return count_different(left, right) == 0


def every_pattern() -> Tensor:
    """All 65536 patterns of sixteen bits."""
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)


def values_around(dtype: torch.dtype) -> Tensor:
    """Each value of a 16-bit dtype, its middle to the next one, and the neighbours of both, in fp32."""
    low = every_pattern().view(dtype).float()
    up = (every_pattern() + 1).view(dtype).float()
    middle = (low.double() / 2 + up.double() / 2).float()
    ends = (torch.tensor(math.inf), torch.tensor(-math.inf))
    near = [torch.nextafter(each, end) for each in (low, middle) for end in ends]
    return torch.cat([low, middle, *near])


def sum_squares(values: Tensor, scale: float) -> float:
    """The sum of (scale * value)^2 in float64, every term added exactly; `scale` is rounded to fp32 first."""
    products: Doubles = (values.double().numpy() * np.float64(np.float32(scale))) ** 2
    return math.fsum(products)
