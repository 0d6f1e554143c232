"""Kernels inside a model, through windlass.functional with autograd: norms and cross-entropy, beside torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_parts.context import Candidate, Context
from gpu_parts.rows import Row

Norm = Callable[[Tensor], Tensor]


def measure_norms(context: Context) -> Iterator[Row]:
    """Forward alone, and forward with backward. Bytes: input and output, then both gradients and the input again."""
    from windlass import functional

    tokens, width = context.size(16384, 8), context.size(4096, 32)
    x = context.random(tokens, width, dtype=torch.bfloat16).requires_grad_()
    weight = context.random(width, dtype=torch.bfloat16).requires_grad_()
    bias = context.random(width, dtype=torch.bfloat16).requires_grad_()
    upstream = context.random(tokens, width, dtype=torch.bfloat16)
    accelerator = context.accelerator
    pairs: dict[str, tuple[Norm, Norm]] = {
        "rms_norm": (
            lambda x: functional.rms_norm(x, weight, accelerator, eps=1e-5),
            lambda x: F.rms_norm(x, (width,), weight, 1e-5),
        ),
        "layer_norm": (
            lambda x: functional.layer_norm(x, weight, bias, accelerator, eps=1e-5),
            lambda x: F.layer_norm(x, (width,), weight, bias, 1e-5),
        ),
    }
    tensor_bytes = x.numel() * x.element_size()
    for name, norms in pairs.items():
        for case, passes in (("forward", 2), ("forward and backward", 5)):
            named = zip(("windlass", f"torch F.{name}"), (True, False), norms, strict=True)
            candidates = [(by, ours, _norm_call(norm, x, upstream, backward=passes > 2)) for by, ours, norm in named]
            words = f"{case}, bf16, {tokens} x {width}"
            yield from context.compare(name, words, candidates, nbytes=passes * tensor_bytes)


def _norm_call(norm: Norm, x: Tensor, upstream: Tensor, *, backward: bool) -> Callable[[], object]:
    def forward() -> Tensor:
        with torch.no_grad():
            return norm(x)

    def both() -> object:
        x.grad = None
        torch.autograd.backward(norm(x), upstream)
        return x.grad

    return both if backward else forward


def measure_cross_entropy(context: Context) -> Iterator[Row]:
    """The last linear layer with its loss at a vocabulary of 128 k, forward and backward: time, and the peak beyond
    inputs and results. "plain" makes logits in fp32, as most training code does; "plain bf16" leaves them in bf16."""
    from windlass import functional

    tokens, width, vocabulary = context.size(8192, 16), context.size(2048, 16), context.size(131072, 96)
    hidden = context.random(tokens, width, dtype=torch.bfloat16).requires_grad_()
    weight = context.random(vocabulary, width, dtype=torch.bfloat16, scale=0.02).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,)).to(context.device)
    accelerator = context.accelerator
    losses: dict[str, Callable[[], Tensor]] = {
        "windlass": lambda: functional.linear_cross_entropy(hidden, weight, targets, accelerator),
        "torch, plain": lambda: F.cross_entropy((hidden @ weight.mT).float(), targets),
        "torch, plain bf16": lambda: F.cross_entropy(hidden @ weight.mT, targets),
    }
    operations = 6.0 * tokens * width * vocabulary
    dtype = context.product_dtype("bfloat16")
    results = hidden.nbytes + weight.nbytes  # their gradients
    for by, loss in losses.items():

        def call(loss: Callable[[], Tensor] = loss) -> Tensor:
            hidden.grad = weight.grad = None
            value = loss()
            value.backward()
            return value

        candidate: Candidate = (by, by == "windlass", call)
        words = f"bf16, {tokens} tokens, width {width}, vocabulary {vocabulary}"
        for row in context.compare("linear_cross_entropy", words, [candidate], operations=operations, dtype=dtype):
            if row.error:
                yield row
                continue
            hidden.grad = weight.grad = None
            peak = context.peak_of(call)
            yield replace(
                row, peak_bytes=None if peak is None else max(peak - results, 0), facts={"loss": float(call())}
            )
        hidden.grad = weight.grad = None
        context.release()


ITEMS = (("norms", measure_norms), ("linear_cross_entropy", measure_cross_entropy))
