"""LayerNorm and RMSNorm over the last dimension, and what goes back through them."""

from __future__ import annotations

import torch
from torch import Tensor

from windlass.accelerator.kernels import KernelSchema

_ROUNDING = "statistics and products in fp32; results are rounded once, to their dtype"
_TOLERANCE = (
    "with f the eps of fp32: (h / 16 + 8) f of the sum of the sizes of its terms for a sum over a row, (t / 16 + 8) f "
    "of that for a sum over tokens, 4 f of the sum of the sizes of what it takes for anything else, all that taken "
    "through the formula, and at last the eps of the result's dtype; inf and nan spoil their row of output and "
    "input_gradient only, and their column of weight_gradient and bias_gradient at least"
)

RMS_NORM = KernelSchema(
    name="rms_norm",
    signature=(
        "(input f32|bf16|f16[t, h], weight f32|bf16|f16[h] or None, *, eps: float) -> (output as input, rstd f32[t])"
    ),
    consumes=(),
    rounding=_ROUNDING,
    tolerance=_TOLERANCE,
)

RMS_NORM_BACKWARD = KernelSchema(
    name="rms_norm_backward",
    signature=(
        "(output_gradient as input, input [t, h], weight [h] or None, rstd f32[t]) "
        "-> (input_gradient as input, weight_gradient as weight or None)"
    ),
    consumes=(),
    rounding=_ROUNDING,
    tolerance=_TOLERANCE,
)

LAYER_NORM = KernelSchema(
    name="layer_norm",
    signature=(
        "(input f32|bf16|f16[t, h], weight f32|bf16|f16[h] or None, bias as weight or None, *, eps: float) "
        "-> (output as input, mean f32[t], rstd f32[t])"
    ),
    consumes=(),
    rounding=_ROUNDING,
    tolerance=_TOLERANCE,
)

LAYER_NORM_BACKWARD = KernelSchema(
    name="layer_norm_backward",
    signature=(
        "(output_gradient as input, input [t, h], weight [h] or None, mean f32[t], rstd f32[t], *, bias: bool) "
        "-> (input_gradient as input, weight_gradient as weight or None, bias_gradient f32[h], as weight where there "
        "is one, or None)"
    ),
    consumes=(),
    rounding=_ROUNDING,
    tolerance=_TOLERANCE,
)


def rms_norm(input: Tensor, weight: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019)."""
    x = input.to(torch.float32)
    rstd = torch.rsqrt((x * x).mean(-1) + eps)
    return _scaled(x * rstd[:, None], weight, None).to(input.dtype), rstd


def rms_norm_backward(
    output_gradient: Tensor, input: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients of rms_norm."""
    normal = input.to(torch.float32) * rstd[:, None]
    gradient = output_gradient.to(torch.float32)
    inner = _scaled(gradient, weight, None)
    back = (inner - normal * (inner * normal).mean(-1, keepdim=True)) * rstd[:, None]
    return back.to(input.dtype), None if weight is None else (gradient * normal).sum(0).to(weight.dtype)


def layer_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps) * weight + bias (Ba, Kiros & Hinton 2016)."""
    x = input.to(torch.float32)
    mean = x.mean(-1)
    centred = x - mean[:, None]
    rstd = torch.rsqrt((centred * centred).mean(-1) + eps)
    return _scaled(centred * rstd[:, None], weight, bias).to(input.dtype), mean, rstd


def layer_norm_backward(
    output_gradient: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, *, bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of layer_norm."""
    normal = (input.to(torch.float32) - mean[:, None]) * rstd[:, None]
    gradient = output_gradient.to(torch.float32)
    inner = _scaled(gradient, weight, None)
    back = inner - inner.mean(-1, keepdim=True) - normal * (inner * normal).mean(-1, keepdim=True)
    weight_gradient = None if weight is None else (gradient * normal).sum(0).to(weight.dtype)
    bias_gradient = gradient.sum(0) if bias else None
    if bias_gradient is not None and weight is not None:
        bias_gradient = bias_gradient.to(weight.dtype)
    return (back * rstd[:, None]).to(input.dtype), weight_gradient, bias_gradient


def _scaled(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = normal if weight is None else normal * weight.to(torch.float32)
    return scaled if bias is None else scaled + bias.to(torch.float32)
