"""Muon's two passes over a vector: momentum with Nesterov's blend before, scale and decay after orthogonalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from windlass.accelerator.kernels import KernelSchema
from windlass.accelerator.reference.noise import low_half, make_noise, round_stochastically
from windlass.accelerator.reference.tolerances import SUBNORMAL

# Layout of the `scalars` vector of scale_decay_update.
SCALE_DECAY_SCALARS = ("lr", "weight_decay", "scale")

MOMENTUM_BLEND = KernelSchema(
    name="momentum_blend",
    signature=(
        "(momentum f32|bf16[n], gradient f32|bf16|f16[n], blended f32|bf16|f16[n], scalars f32[2]: mu and 1 - mu, "
        "gradient_scale f32[], keep bool[], noise i64[2] or None, *, nesterov: bool) -> (momentum, blended)"
    ),
    consumes=("momentum", "blended"),
    rounding=(
        "fp32 throughout; a momentum of bf16 is rounded stochastically, by the lower half of the element's noise, "
        "which must be given then and may not be given otherwise; blended comes from the momentum before that, rounded "
        "to nearest even"
    ),
    tolerance=(
        "4 ulp of fp32 of the largest term of each sum, before a rounding to 16 bits; equal bits however the vector is "
        f"sliced; {SUBNORMAL}"
    ),
)

SCALE_DECAY_UPDATE = KernelSchema(
    name="scale_decay_update",
    signature=(
        "(weight f32[n], direction f32|bf16|f16[n], scalars f32[3]: lr, weight_decay, scale, keep bool[], "
        "low bf16|f16[n] or None) -> (weight, low)"
    ),
    consumes=("weight", "low"),
    rounding="fp32 throughout; low is weight rounded to nearest even",
    tolerance=(f"4 ulp of fp32 of the largest term of the sum; equal bits however the vector is sliced; {SUBNORMAL}"),
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
    """momentum <- momentum + (1 - mu) (g - momentum), and what is to be orthogonalised: g + mu (momentum - g) with
    Nesterov's blend, the momentum without (Jordan et al. 2024, "Muon"). g is `gradient_scale` times the gradient.

    `keep` false leaves the momentum as it was and gives zeros, so that an overflow spoils nothing that comes after.
    """
    require_noise(momentum, noise)
    mu, rest = scalars.unbind()
    g = gradient.to(torch.float32) * gradient_scale
    before = momentum.to(torch.float32)
    after = before + rest * (g - before)
    direction = g + mu * (after - g) if nesterov else after
    stored = after if noise is None else round_stochastically(after, low_half(make_noise(noise, after.numel())))
    momentum.copy_(torch.where(keep, stored, momentum))
    blended.copy_(torch.where(keep, direction, torch.zeros_like(direction)))
    return momentum, blended


def scale_decay_update(
    weight: Tensor, direction: Tensor, scalars: Tensor, keep: Tensor, low: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """weight <- weight (1 - lr decay) - lr scale direction, and its copy in 16 bits; nothing where not `keep`."""
    lr, decay, scale = scalars.unbind()
    new = weight * (1 - lr * decay) - (lr * scale) * direction.to(torch.float32)
    weight.copy_(torch.where(keep, new, weight))
    if low is not None:
        low.copy_(torch.where(keep, weight.to(low.dtype), low))
    return weight, low


def require_noise(momentum: Tensor, noise: Tensor | None) -> None:
    """Raise ValueError unless there is noise exactly for a momentum that is rounded."""
    if (noise is None) != (momentum.dtype is torch.float32):
        raise ValueError(
            f"kernel 'momentum_blend' got {'no ' if noise is None else ''}noise for a momentum of {momentum.dtype}, "
            f"wanted {'some' if noise is None else 'none'}; only what is rounded to 16 bits needs it"
        )
