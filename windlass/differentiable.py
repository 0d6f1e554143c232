"""The accelerator's kernels with what goes back through them, as autograd knows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from windlass.accelerator.interface import Accelerator


class _CrossEntropy(torch.autograd.Function):
    """The sum or mean of the losses; gradients of the sum wait for what they are to be multiplied with."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        accelerator: Accelerator,
        ignore_index: int,
        chunk: int,
        wanted: tuple[bool, bool],
        mean: bool,
    ) -> Tensor:
        losses, *gradients = accelerator.kernels["linear_cross_entropy"](
            hidden, weight, targets, None,
            ignore_index=ignore_index, chunk=chunk, hidden_gradient=wanted[0], weight_gradient=wanted[1],
        )  # fmt: skip
        total: Tensor = losses.sum()
        count = (targets != ignore_index).sum() if mean else None
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(*gradients, count)
        return total if count is None else total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, count = ctx.saved_tensors
        scale = (
            gradient if count is None else gradient / count.clamp(min=1)
        )  # of nothing the gradients are 0, as torch's
        return *(_multiply(one, scale, ctx.dtype) for one in gradients), *[None] * 6


class _CrossEntropyOfEach(torch.autograd.Function):
    """The loss of each token; backward computes the logits again, and counts each token as it is told."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        accelerator: Accelerator,
        ignore_index: int,
        chunk: int,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        ctx.accelerator, ctx.wanted = accelerator, wanted
        ctx.options = {"ignore_index": ignore_index, "chunk": chunk}
        ctx.save_for_backward(hidden, weight, targets)
        kernel = accelerator.kernels["linear_cross_entropy"]
        losses: Tensor
        losses, _, _ = kernel(
            hidden, weight, targets, None, **ctx.options, hidden_gradient=False, weight_gradient=False
        )
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        largest = gradient.abs().amax() if gradient.numel() else gradient.new_ones(())
        largest = torch.where(largest > 0, largest, 1.0)
        kernel = ctx.accelerator.kernels["linear_cross_entropy"]
        first, second = ctx.wanted
        with torch.autocast(hidden.device.type, enabled=False):
            _, *gradients = kernel(
                hidden, weight, targets, (gradient / largest).contiguous(),
                **ctx.options, hidden_gradient=first, weight_gradient=second,
            )  # fmt: skip
        return *(_multiply(one, largest, hidden.dtype) for one in gradients), *[None] * 5


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, accelerator: Accelerator, eps: float) -> Tensor:
        output: Tensor
        output, rstd = accelerator.kernels["rms_norm"](x, weight, eps=eps)
        ctx.accelerator = accelerator
        ctx.save_for_backward(x, weight, rstd)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        back, weight_gradient = ctx.accelerator.kernels["rms_norm_backward"](gradient, x, weight, rstd)
        return back, weight_gradient, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, accelerator: Accelerator, eps: float
    ) -> Tensor:
        output: Tensor
        output, mean, rstd = accelerator.kernels["layer_norm"](x, weight, bias, eps=eps)
        ctx.accelerator, ctx.bias_dtype = accelerator, None if bias is None else bias.dtype
        ctx.save_for_backward(x, weight, mean, rstd)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        back, weight_gradient, bias_gradient = ctx.accelerator.kernels["layer_norm_backward"](
            gradient, x, weight, mean, rstd, bias=ctx.bias_dtype is not None
        )
        if bias_gradient is not None:  # without a weight it is fp32
            bias_gradient = bias_gradient.to(ctx.bias_dtype)
        return back, weight_gradient, bias_gradient, None, None


def _multiply(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`factor`, a number on the device, times a gradient: multiplied in fp32 and rounded once.

    In place, unless the graph is kept for another backward pass: a weight's gradient is not to be there twice.
    """
    if gradient is None:
        return None
    vector = factor.to(torch.float32).reshape(1)  # a number without a dimension would be rounded first
    if gradient.dtype is dtype and not torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient.mul_(vector)
    return torch.mul(gradient, vector, out=torch.empty_like(gradient, dtype=dtype))


cross_entropy: Callable[..., Tensor] = _CrossEntropy.apply
cross_entropy_of_each: Callable[..., Tensor] = _CrossEntropyOfEach.apply
norm_by_root: Callable[..., Tensor] = _RMSNorm.apply
norm_by_layer: Callable[..., Tensor] = _LayerNorm.apply
