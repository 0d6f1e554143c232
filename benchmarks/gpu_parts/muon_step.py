"""Muon's step on the matrices of the model, as its kernels alone make it; the optimizer itself is not written yet.

Momentum and blend, polar factors, scale and decay over all matrices (q, k and v apart), AdamW on everything else, and
the norm of all gradients. Its share is that of a step of 64 k tokens: forward and backward are measured at one
micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from gpu_parts.context import Context
from gpu_parts.gpt import model_shape
from gpu_parts.matrix_kernels import find_torch_iteration
from gpu_parts.rows import Row
from gpu_parts.systems import batch, build
from gpu_parts.training import fit
from windlass.accelerator.polar import COEFFICIENTS, standard_flops

PART: Final = "training"
_COEFFICIENTS: Final = COEFFICIENTS["jordan"]
_TOKENS: Final = 65536


def measure_muon(context: Context) -> Iterator[Row]:
    """Forward and backward alone; polar factors by both forms; the whole step by the quicker form of each shape."""
    forward_backward: list[Row] = []
    for row in fit(context, lambda rows: _measure_forward_backward(context, rows)):
        forward_backward.append(row)
        yield row
    context.release()
    quickest: dict[tuple[int, int], tuple[float, str]] = {}
    for shape, count in model_shape(context).stacks().items():
        for row, kernel in _measure_polar(context, shape, count):
            yield row
            if row.seconds is not None and row.ours:
                quickest[shape] = min(quickest.get(shape, (row.seconds, kernel)), (row.seconds, kernel))
        context.release()
    step = make_muon_step(context, {shape: kernel for shape, (_, kernel) in quickest.items()})
    forms = ", ".join(f"{rows} x {columns} {kernel}" for (rows, columns), (_, kernel) in quickest.items())
    for row in context.compare("Muon's step", forms, [("windlass kernels", True, step)], part=PART):
        yield _with_share(row, forward_backward[0])
    del step
    context.release()
    theirs = _torch_muon(context)
    if theirs is not None:
        words = "fp32 weights, fp32 gradients, matrices only, q|k|v in one"
        for row in context.compare("Muon's step", words, [("torch.optim.Muon", False, theirs)], part=PART):
            yield _with_share(row, forward_backward[0])


def _with_share(row: Row, forward_backward: Row) -> Row:
    """Of a step of 64 k tokens, whose forward and backward take as long per token as they did."""
    if row.seconds is None or not forward_backward.value:
        return row
    rest = _TOKENS / forward_backward.value
    return replace(row, facts={"share_of_step": row.seconds / (row.seconds + rest), "tokens": _TOKENS})


def _measure_forward_backward(context: Context, rows: int) -> Iterator[Row]:
    model = build(context).to(torch.bfloat16)
    ids, targets = batch(context, rows)
    parameters = list(model.parameters())

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        model(ids, targets).backward()

    tokens = ids.numel()
    seconds = context.seconds(run)
    case = f"{rows} x {ids.shape[1]} tokens"
    yield Row(PART, "forward and backward alone", case, "torch, bf16", False, seconds, tokens / seconds, "tokens/s")


def _measure_polar(context: Context, shape: tuple[int, int], count: int) -> Iterator[tuple[Row, str]]:
    stack = context.random(count, *shape, dtype=torch.bfloat16)
    operations = count * standard_flops(*shape, len(_COEFFICIENTS))
    kernels, bf16 = context.accelerator.kernels, context.product_dtype("bfloat16")
    case = f"{count} x {shape[0]} x {shape[1]}"
    for name, dtype in (("polar", bf16), ("polar_gram", context.product_dtype("float16"))):
        call = _polar_call(kernels[name], stack, dtype)
        candidates = [(f"windlass {name}, {dtype}", True, call)]
        for row in context.compare(
            "Muon's polar factors", case, candidates, operations=operations, dtype=bf16, part=PART
        ):
            yield row, name


def _polar_call(kernel: Callable[..., Tensor], stack: Tensor, dtype: str) -> Callable[[], Tensor]:
    return lambda: kernel(stack, _COEFFICIENTS, product_dtype=getattr(torch, dtype))


def make_muon_step(context: Context, forms: dict[tuple[int, int], str]) -> Callable[[], object]:
    """The whole step on vectors of the model's size. States: fp32 weights and momenta, bf16 gradients and copies."""
    trained, kernels = model_shape(context), context.accelerator.kernels
    one, keep = context.scalar(1.0), context.scalar(True)
    mu = torch.tensor([0.95, 0.05]).to(context.device)
    scalars = torch.tensor([1e-3, 0.1, 1.0]).to(context.device)
    adamw_scalars = torch.tensor([1e-3, 0.9, 0.1, 0.95, 0.05, 1e-8, 0.1, 0.5, 0.3]).to(context.device)
    matrices = sum(count * rows * columns for (rows, columns), count in trained.stacks().items())
    rest = trained.shape.num_parameters - matrices
    gradient = context.random(matrices + rest, dtype=torch.bfloat16)
    weight, momentum = context.random(matrices), context.random(matrices)
    blended, low = (torch.empty(matrices, dtype=torch.bfloat16, device=context.device) for _ in range(2))
    others: Any = [context.random(rest), context.random(rest), context.random(rest).square_(), gradient.new_zeros(rest)]
    dtypes = {"polar": context.product_dtype("bfloat16"), "polar_gram": context.product_dtype("float16")}

    def step() -> None:
        kernels["square_sum"](gradient, one)
        kernels["momentum_blend"](momentum, gradient[:matrices], blended, mu, one, keep, None, nesterov=True)
        start = 0
        for (rows, columns), count in trained.stacks().items():
            part = slice(start, start + count * rows * columns)
            form = forms.get((rows, columns), "polar")
            stack = blended[part].view(count, rows, columns)
            direction = kernels[form](stack, _COEFFICIENTS, product_dtype=getattr(torch, dtypes[form]))
            kernels["scale_decay_update"](weight[part], direction.view(-1), scalars, keep, low[part])
            start = part.stop
        first, second, third, narrow = others
        kernels["adamw"](first, gradient[matrices:], second, third, adamw_scalars, one, keep, narrow, decoupled=True)

    return step


def _torch_muon(context: Context) -> Callable[[], object] | None:
    """torch.optim.Muon on the matrices of the model as they lie there; None where torch has none."""
    if find_torch_iteration() is None:
        return None
    parameters = []
    for (rows, columns), count in model_shape(context).stacks().items():
        if rows == columns:  # three of four are one matrix q|k|v
            parameters += [nn.Parameter(context.random(3 * rows, columns)) for _ in range(count // 4)]
            count //= 4
        parameters += [nn.Parameter(context.random(rows, columns)) for _ in range(count)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.Muon(parameters, lr=1e-3, weight_decay=0.1).step


ITEMS = (("Muon's step", measure_muon),)
