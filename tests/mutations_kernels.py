"""Mutations of the CPU's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mutations import mutation
from windlass.accelerator.kernels import Kernels
from windlass.backends.cpu import kernels


@mutation("cpu", kernels, "adamw", "exp_avg is eight ulp off", "test_l1_adamw.py::test_bounds")
def adamw_exp_avg_inexact(adamw: Any, *args: Any, **options: Any) -> Any:
    weight, exp_avg, exp_avg_sq, low = adamw(*args, **options)
    return weight, exp_avg.mul_(1 + 8 * torch.finfo(torch.float32).eps), exp_avg_sq, low


@mutation("cpu", kernels, "adamw", "`keep` is ignored", "test_l1_adamw_rules.py::test_skipped_update[float32]")
def adamw_ignores_keep(adamw: Any, *args: Any, **options: Any) -> Any:
    before, keep, after = args[:6], args[6], args[7:]
    return adamw(*before, torch.ones_like(keep), *after, **options)


@mutation("cpu", kernels, "adamw", "eps is added inside the root", "test_l1_adamw.py::test_bounds")
def adamw_epsilon_inside_root(adamw: Any, *args: Any, **options: Any) -> Any:
    weight, _, _, _, scalars, _, keep, low = args
    old = weight.clone()
    weight, exp_avg, exp_avg_sq, low = adamw(*args, **options)
    lr, _, _, _, _, eps, decay, correction1, correction2 = scalars.unbind()
    shrunk = old * (1 - lr * decay) if options.get("decoupled", True) else old
    new = shrunk - (lr / correction1) * (exp_avg / (exp_avg_sq / correction2 + eps).sqrt())
    weight.copy_(torch.where(keep, new, old))
    if low is not None:
        low.copy_(torch.where(keep, weight.to(low.dtype), low))
    return weight, exp_avg, exp_avg_sq, low


@mutation(
    "cpu",
    kernels,
    "adamw",
    "the last n % 16 weights are rounded up, so slices differ",
    "test_l1_adamw_rules.py::test_slices[float32]",
)
def adamw_depends_on_slices(adamw: Any, *args: Any, **options: Any) -> Any:
    weight, exp_avg, exp_avg_sq, low = adamw(*args, **options)
    tail = weight[weight.numel() // 16 * 16 :]
    tail.copy_(torch.nextafter(tail, torch.full_like(tail, torch.inf)))
    return weight, exp_avg, exp_avg_sq, low


@mutation("cpu", kernels, "adamw", "the low weight is made from the old weight", "test_l1_adamw.py::test_bounds")
def adamw_low_from_old_weight(adamw: Any, *args: Any, **options: Any) -> Any:
    old = args[0].clone()
    weight, exp_avg, exp_avg_sq, low = adamw(*args, **options)
    return weight, exp_avg, exp_avg_sq, low if low is None else low.copy_(old)


@mutation("cpu", kernels, "adamw", "decay is always decoupled", "test_l1_adamw.py::test_bounds")
def adamw_always_decoupled(adamw: Any, *args: Any, decoupled: bool = True) -> Any:
    return adamw(*args)


@mutation(
    "cpu", kernels, "adamw", "the gradient is overwritten, which is not consumed", "test_l1_adamw_rules.py::test_slices"
)
def adamw_scales_gradient_in_place(adamw: Any, *args: Any, **options: Any) -> Any:
    result = adamw(*args, **options)
    args[1].mul_(args[5])
    return result


@mutation(
    "cpu", kernels, "square_sum", "values are squared before they are scaled", "test_l1_square_sum.py::test_range"
)
def square_sum_scales_last(square_sum: Any, values: Tensor, scale: Tensor) -> Tensor:
    result: Tensor = square_sum(values, torch.ones_like(scale))
    result[0] *= scale * scale
    return result


@mutation(
    "cpu",
    kernels,
    "square_sum",
    "a nan among the last n % 16 is missed",
    "test_l1_square_sum.py::test_not_finite[float32]",
)
def square_sum_misses_tail(square_sum: Any, values: Tensor, scale: Tensor) -> Tensor:
    result: Tensor = square_sum(values, scale)
    result[1] = square_sum(values[: values.numel() // 16 * 16], scale)[1]
    return result


@mutation(
    "cpu", kernels, "square_sum", "everything is called finite", "test_l1_square_sum.py::test_not_finite[float32]"
)
def square_sum_always_finite(square_sum: Any, *args: Any) -> Tensor:
    result: Tensor = square_sum(*args)
    result[1] = 0
    return result


@mutation("cpu", kernels, "square_sum", "sums are kept in bfloat16", "test_l1_square_sum.py::test_sum")
def square_sum_in_bfloat16(square_sum: Any, *args: Any) -> Tensor:
    result: Tensor = square_sum(*args)
    result[0] = result[0].bfloat16()
    return result


@mutation(
    "cpu", kernels, "scale_cast", "the product is rounded to bfloat16 first", "test_l1_scale_cast.py::test_rounding"
)
def scale_cast_rounds_twice(scale_cast: Any, destination: Tensor, source: Tensor, scale: Tensor) -> Tensor:
    product = (source.float() * scale).bfloat16()
    return destination.copy_(product)


@mutation("cpu", kernels, "scale_cast", "bfloat16 is truncated, not rounded", "test_l1_scale_cast.py::test_rounding")
def scale_cast_truncates(scale_cast: Any, destination: Tensor, source: Tensor, scale: Tensor) -> Any:
    if destination.dtype != torch.bfloat16:
        return scale_cast(destination, source, scale)
    bits = (source.float() * scale).view(torch.int32)
    return destination.copy_((bits & -65536).view(torch.float32))


@mutation(
    "cpu", Kernels, "__getitem__", "calls of kernels are not counted", "test_l1_registry.py::test_forced_and_counted"
)
def kernel_calls_not_counted(getitem: Any, self: Kernels, name: str) -> Callable[..., Any]:
    return self._chosen[name].function
