"""Kernels that move bytes: time per call, and bytes that must move over the rate of a copy in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpu_parts.context import Candidate, Context
from gpu_parts.gpt import model_shape
from gpu_parts.rows import Row

_ADAMW = (1e-3, 0.9, 0.1, 0.95, 0.05, 1e-8, 0.1, 0.5, 0.3)  # as ADAMW_SCALARS orders them
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def measure_adamw(context: Context) -> Iterator[Row]:
    """One vector, beside torch's fused AdamW on a vector of the same length."""
    n = context.size(2**28, 2**12)
    for gradient_dtype, low_dtype in ((torch.bfloat16, torch.bfloat16), (torch.float32, None)):
        weight, first, second = context.random(n), context.random(n, scale=0.1), context.random(n).square_()
        gradient = context.random(n, dtype=gradient_dtype)
        low = None if low_dtype is None else weight.to(low_dtype)
        scalars = torch.tensor(_ADAMW).to(context.device)
        arguments = (weight, gradient, first, second, scalars, context.scalar(1.0), context.scalar(True), low)
        nbytes = n * (24 + gradient_dtype.itemsize + (0 if low_dtype is None else low_dtype.itemsize))
        yield from context.compare(
            "adamw",
            f"{_SHORT[gradient_dtype]} gradient, low {_SHORT[low_dtype] if low_dtype else 'none'}, {n:,}",
            context.implementations("adamw", *arguments, decoupled=True),
            nbytes=nbytes,
        )
        if low is not None and "adamw_bf16_moments" in context.accelerator.kernels.schemas:
            noise = torch.tensor([1, 0]).to(context.device)
            moments = (first.to(torch.bfloat16), second.to(torch.bfloat16))
            rest = (scalars, context.scalar(1.0), context.scalar(True), low, noise)
            yield from context.compare(
                "adamw_bf16_moments",
                f"bf16 gradient, low bf16, {n:,}",
                context.implementations("adamw_bf16_moments", weight, gradient, *moments, *rest, decoupled=True),
                nbytes=n * 20,
            )
            del moments, noise, rest
        del arguments, weight, first, second, gradient, low
        context.release()
    step = _torch_adamw(context, [(n,)], fused=True)
    yield from context.compare(
        "adamw", f"fp32 gradient, low none, {n:,}", [("torch fused AdamW", False, step)], nbytes=28 * n
    )


def measure_adamw_many(context: Context) -> Iterator[Row]:
    """All tensors of a model, and many small ones, beside torch's fused and foreach AdamW on tensors of the same
    shapes. Theirs are fp32 throughout, which is as many bytes as fp32 with gradients and a copy in bf16."""
    small: list[tuple[int, ...]] = [(context.size(10_000, 40),)] * context.size(1000, 4)
    for case, shapes in (("tensors of the model", model_shape(context).parameter_shapes()), ("small tensors", small)):
        sizes = [torch.Size(shape).numel() for shape in shapes]
        parts = []
        for size in sizes:
            weight, moment = context.random(size), context.random(size, scale=0.1)
            parts.append((weight, weight.to(torch.bfloat16), moment, moment.square(), weight.to(torch.bfloat16)))
        scalars = torch.tensor([_ADAMW]).to(context.device)
        arguments = (parts, scalars, [0] * len(parts), context.scalar(1.0), context.scalar(True))
        words = f"{case}, {len(sizes)} of {sum(sizes):,} in all"
        ours = context.implementations("adamw_many", *arguments, decoupled=True)
        yield from context.compare("adamw_many", words, ours, nbytes=28 * sum(sizes))
        del parts, arguments, weight, moment, ours
        context.release()
        for by, options in (("torch fused AdamW", {"fused": True}), ("torch foreach AdamW", {"foreach": True})):
            step = _torch_adamw(context, shapes, **options)
            yield from context.compare("adamw_many", words, [(by, False, step)], nbytes=28 * sum(sizes))
            del step
            context.release()


def measure_square_sum(context: Context) -> Iterator[Row]:
    """Sum of squares and finite check, beside torch's norms, which check nothing."""
    n = context.size(2**29, 2**12)
    for dtype in (torch.bfloat16, torch.float32):
        values = context.random(n, dtype=dtype)
        candidates: list[Candidate] = list(context.implementations("square_sum", values, context.scalar(1.0)))
        wide = torch.float32

        def norm(values: Tensor = values, wide: torch.dtype = wide) -> Tensor:
            norm: Tensor = torch.linalg.vector_norm(values, dtype=wide)
            return norm

        def foreach_norm(values: Tensor = values) -> list[Tensor]:
            return list(torch._foreach_norm(list(values.chunk(16))))

        candidates += [("torch vector_norm", False, norm), ("torch foreach_norm", False, foreach_norm)]
        yield from context.compare("square_sum", f"{_SHORT[dtype]}, {n:,}", candidates, nbytes=n * dtype.itemsize)
        del values, candidates, norm, foreach_norm
        context.release()


def measure_scale_cast(context: Context) -> Iterator[Row]:
    """Scale and cast, beside torch's copy_, which casts and does not scale."""
    n = context.size(2**28, 2**12)
    for source_dtype, target_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        source, target = (
            context.random(n, dtype=source_dtype),
            torch.empty(n, dtype=target_dtype, device=context.device),
        )

        def cast(source: Tensor = source, target: Tensor = target) -> Tensor:
            return target.copy_(source)

        candidates: list[Candidate] = list(context.implementations("scale_cast", target, source, context.scalar(0.5)))
        candidates.append(("torch copy_", False, cast))
        case = f"{_SHORT[source_dtype]} to {_SHORT[target_dtype]}, {n:,}"
        nbytes = n * (source_dtype.itemsize + target_dtype.itemsize)
        yield from context.compare("scale_cast", case, candidates, nbytes=nbytes)
        del source, target, candidates, cast
        context.release()


def measure_momentum(context: Context) -> Iterator[Row]:
    """Muon's two passes over a vector, beside the operations that torch.optim.Muon issues for them."""
    n = context.size(2**28, 2**12)
    momentum, weight = context.random(n), context.random(n)
    gradient = context.random(n, dtype=torch.bfloat16)
    blended, low = torch.empty_like(gradient), torch.empty_like(gradient)
    one, keep = context.scalar(1.0), context.scalar(True)
    mu = torch.tensor([0.95, 0.05]).to(context.device)

    def blend() -> Tensor:
        wide = gradient.to(torch.float32)
        momentum.lerp_(wide, 0.05)
        return blended.copy_(wide.lerp_(momentum, 0.95))

    candidates: list[Candidate] = list(
        context.implementations("momentum_blend", momentum, gradient, blended, mu, one, keep, None, nesterov=True)
    )
    candidates.append(("torch lerp_, lerp, copy_", False, blend))
    yield from context.compare("momentum_blend", f"fp32, bf16 gradient, {n:,}", candidates, nbytes=12 * n)

    def update() -> Tensor:
        weight.mul_(1 - 1e-3 * 0.1)
        weight.add_(blended, alpha=-1e-3)
        return low.copy_(weight)

    scalars = torch.tensor([1e-3, 0.1, 1.0]).to(context.device)
    candidates = list(context.implementations("scale_decay_update", weight, blended, scalars, keep, low))
    candidates.append(("torch mul_, add_, copy_", False, update))
    yield from context.compare("scale_decay_update", f"bf16 direction, {n:,}", candidates, nbytes=12 * n)


def _torch_adamw(context: Context, shapes: Sequence[tuple[int, ...]], **options: Any) -> Callable[[], object]:
    parameters = [nn.Parameter(context.random(*shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.01)
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, **options).step


ITEMS = (
    ("adamw", measure_adamw),
    ("adamw_many", measure_adamw_many),
    ("square_sum", measure_square_sum),
    ("scale_cast", measure_scale_cast),
    ("momentum_blend and scale_decay_update", measure_momentum),
)
