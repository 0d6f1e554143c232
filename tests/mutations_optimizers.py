"""Mutations of the references of the optimizers' kernels, which the CPU runs where it has nothing faster."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mutations import mutation
from windlass.accelerator import reference
from windlass.accelerator.kernels import Kernel, Kernels
from windlass.backends.cpu import device

MANY, BF16, MOMENTUM = "test_l1_adamw_many.py", "test_l1_bf16_moments.py", "test_l1_momentum.py"
KernelFunction = Callable[..., Any]

# By name, since the package has functions of these names.
adamw_reference, momentum_reference, noise_reference = (
    importlib.import_module(f"{reference.__name__}.{name}") for name in ("adamw", "momentum", "noise")
)


def broken_reference(name: str, breaks: str, *where: str) -> Callable[[KernelFunction], None]:
    """Name a mutation after the decorated function, which stands in for the reference of a kernel and gets the
    original as its first argument."""

    def decorate(function: KernelFunction) -> None:
        def references(original: Callable[[], tuple[Kernel, ...]]) -> tuple[Kernel, ...]:
            return tuple(broken(kernel) if kernel.name == name else kernel for kernel in original())

        def broken(kernel: Kernel) -> Kernel:
            right = kernel.function
            return replace(kernel, function=lambda *args, **options: function(right, *args, **options))

        references.__name__ = function.__name__
        mutation("cpu", device, "reference_kernels", breaks, *where)(references)

    return decorate


@mutation("cpu", reference, "adamw_many", "every part takes the first row", f"{MANY}::test_equals_one_by_one")
def many_takes_first_row(
    many: Any, kernels: Kernels, parts: Any, scalars: Tensor, rows: Any, *args: Any, **more: Any
) -> Any:
    return many(kernels, parts, scalars, [0] * len(rows), *args, **more)


@mutation("cpu", reference, "adamw_many", "empty parts are not given back", f"{MANY}::test_nothing_to_update")
def many_drops_empty_parts(many: Any, *args: Any, **more: Any) -> Any:
    return [one for one in many(*args, **more) if one[0].numel()]


@mutation(
    "cpu", reference, "adamw_many", "the element after a part is written too", f"{MANY}::test_slices_of_one_vector"
)
def many_writes_beyond(many: Any, kernels: Kernels, parts: Sequence[Any], *args: Any, **more: Any) -> Any:
    results = many(kernels, parts, *args, **more)
    for weight, *_ in parts:
        end = weight.storage_offset() + weight.numel()
        if weight.numel() and end < weight.untyped_storage().nbytes() // weight.element_size():
            weight.as_strided((1,), (1,), end).zero_()
    return results


_seen: dict[int, Tensor] = {}


@mutation(
    "cpu",
    reference,
    "adamw_many",
    "numbers are remembered by where they lie",
    f"{MANY}::test_calls_after_each_other",
)
def many_remembers_scalars(many: Any, kernels: Kernels, parts: Any, scalars: Tensor, *args: Any, **more: Any) -> Any:
    return many(kernels, parts, _seen.setdefault(scalars.data_ptr(), scalars.clone()), *args, **more)


@mutation("cpu", reference, "adamw_many", "`keep` is ignored", f"{MANY}::test_skipped_update")
def many_ignores_keep(many: Any, *args: Any, **more: Any) -> Any:
    *before, keep = args
    return many(*before, torch.ones_like(keep), **more)


@mutation(
    "cpu",
    reference,
    "adamw_many",
    "a gradient that is not finite is taken for zero",
    f"{MANY}::test_gradient_that_is_not_finite",
)
def many_hides_what_is_not_finite(many: Any, kernels: Kernels, parts: Sequence[Any], *args: Any, **more: Any) -> Any:
    cleaned = [(one[0], torch.nan_to_num(one[1], posinf=0, neginf=0), *one[2:]) for one in parts]
    return many(kernels, cleaned, *args, **more)


@mutation(
    "cpu",
    adamw_reference,
    "round_stochastically",
    "moments are rounded to nearest",
    f"{BF16}::test_bounds[float32-decoupled]",
)
def moments_rounded_to_nearest(rounded: Any, values: Tensor, chance: Tensor) -> Tensor:
    return values.to(torch.bfloat16)


@mutation(
    "cpu",
    adamw_reference,
    "make_noise",
    "the upper half of an index is forgotten",
    f"{BF16}::test_noise[crossing]",
)
def noise_of_half_an_index(make_noise: Any, noise: Tensor, count: int) -> Tensor:
    words = [make_noise(torch.stack((noise[0], (noise[1] + i) & 0xFFFFFFFF)), 1) for i in range(count)]
    return torch.cat(words)


@mutation("cpu", adamw_reference, "low_half", "chances never reach one half", f"{BF16}::test_mean[0.9]")
def chances_too_small(low_half: Any, noise: Tensor) -> Tensor:
    return noise & 0x7FFF


@mutation("cpu", adamw_reference, "make_noise", "every slice begins at index 0", f"{BF16}::test_slices")
def noise_begins_anew(make_noise: Any, noise: Tensor, count: int) -> Any:
    return make_noise(noise * torch.tensor([1, 0]), count)


@broken_reference("adamw_bf16_moments", "moments are written though nothing is kept", f"{BF16}::test_skipped_update")
def moments_ignore_keep(update: Any, *args: Any, **more: Any) -> Any:
    *before, keep, low, noise = args
    vectors = [one.clone() for one in before[:4]]
    weight, *_ = update(*before, keep, low, noise, **more)
    _, first, second, _ = update(*vectors, *before[4:], torch.ones_like(keep), None, noise, **more)
    return weight, before[2].copy_(first), before[3].copy_(second), low


@mutation(
    "cpu",
    adamw_reference,
    "round_stochastically",
    "a moment that is not finite becomes zero",
    f"{BF16}::test_gradient_that_is_not_finite",
)
def rounding_hides_what_is_not_finite(rounded: Any, values: Tensor, chance: Tensor) -> Any:
    return rounded(torch.nan_to_num(values, posinf=0, neginf=0), chance)


@broken_reference("momentum_blend", "Nesterov's blend is always made", f"{MOMENTUM}::test_blend[float32-float32-plain]")
def blend_always_nesterov(blend: Any, *args: Any, nesterov: bool = True) -> Any:
    return blend(*args, nesterov=True)


@broken_reference("momentum_blend", "the blend is truncated to bf16", f"{MOMENTUM}::test_rounding_of_blend[bfloat16]")
def blend_truncates(blend: Any, momentum: Tensor, gradient: Tensor, blended: Tensor, *args: Any, **more: Any) -> Any:
    momentum, wide = blend(momentum, gradient, blended.to(torch.float32), *args, **more)
    cut = (wide.view(torch.int32) & -65536).view(torch.float32) if blended.dtype is torch.bfloat16 else wide
    return momentum, blended.copy_(cut)


@mutation("cpu", momentum_reference, "low_half", "the upper half of the noise is used", f"{MOMENTUM}::test_noise")
def blend_takes_upper_half(low_half: Any, noise: Tensor) -> Tensor:
    upper: Tensor = noise_reference.high_half(noise)
    return upper


@broken_reference(
    "momentum_blend",
    "noise for a momentum of fp32 is passed over",
    f"{MOMENTUM}::test_noise_goes_with_bf16[float32]",
)
def blend_passes_over_noise(blend: Any, *args: Any, **more: Any) -> Any:
    *before, noise = args
    return blend(*before, None if before[0].dtype is torch.float32 else noise, **more)


@broken_reference("momentum_blend", "a skipped blend is left as it was", f"{MOMENTUM}::test_skipped_blend")
def blend_left_when_skipped(blend: Any, *args: Any, **more: Any) -> Any:
    old, keep = args[2].clone(), args[5]
    momentum, blended = blend(*args, **more)
    return momentum, blended.copy_(torch.where(keep, blended, old))


@mutation(
    "cpu",
    momentum_reference,
    "make_noise",
    "every slice begins at index 0",
    f"{MOMENTUM}::test_slices_of_blend[bfloat16]",
)
def blend_noise_begins_anew(make_noise: Any, noise: Tensor, count: int) -> Any:
    return make_noise(noise * torch.tensor([1, 0]), count)


@broken_reference("scale_decay_update", "the direction decays too", f"{MOMENTUM}::test_update[float32-none]")
def update_decays_direction(update: Any, weight: Tensor, direction: Tensor, scalars: Tensor, *args: Any) -> Any:
    return update(weight, direction * (1 - scalars[0] * scalars[1]), scalars, *args)


@broken_reference("scale_decay_update", "the low copy is made before", f"{MOMENTUM}::test_update[float32-bfloat16]")
def update_copies_before(update: Any, weight: Tensor, *args: Any) -> Any:
    old = weight.clone()
    weight, low = update(weight, *args)
    return weight, low if low is None else low.copy_(old)


@broken_reference("scale_decay_update", "`keep` is ignored", f"{MOMENTUM}::test_skipped_update")
def update_ignores_keep(update: Any, *args: Any) -> Any:
    weight, direction, scalars, keep, low = args
    return update(weight, direction, scalars, torch.ones_like(keep), low)


@broken_reference(
    "scale_decay_update",
    "the last n % 16 weights are rounded up, so slices differ",
    f"{MOMENTUM}::test_slices_of_update",
)
def update_depends_on_slices(update: Any, *args: Any) -> Any:
    weight, low = update(*args)
    tail = weight[weight.numel() // 16 * 16 :]
    tail.copy_(torch.nextafter(tail, torch.full_like(tail, torch.inf)))
    return weight, low
