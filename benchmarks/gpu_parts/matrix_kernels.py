"""Polar factors, beside the Newton-Schulz iteration of torch.optim.Muon, all in the FLOPs of the standard form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import Tensor

from gpu_parts.context import Candidate, Context
from gpu_parts.rows import Row
from windlass.accelerator.polar import COEFFICIENTS, standard_flops

_COEFFICIENTS: Final = COEFFICIENTS["jordan"]
_FULL: Final = ((16, 1024, 1024), (1, 1024, 1024), (1, 4096, 4096), (1, 4096, 16384))
_SMALL: Final = ((2, 32, 32), (1, 48, 48), (1, 32, 128))


def measure_polar(context: Context) -> Iterator[Row]:
    """Both forms for each shape, each in the narrowest dtype that its schema takes and the device multiplies fast."""
    wide, gram = context.product_dtype("bfloat16"), context.product_dtype("float16")
    for shape in _FULL if context.scale == "full" else _SMALL:
        stack = context.random(*shape, dtype=torch.bfloat16)
        case = " x ".join(str(size) for size in shape if size > 1)
        matrices, rows, columns = shape
        operations = matrices * standard_flops(rows, columns, len(_COEFFICIENTS))
        for kernel, dtype in (("polar", wide), ("polar_gram", gram)):
            ours = context.implementations(kernel, stack, _COEFFICIENTS, product_dtype=getattr(torch, dtype))
            words = f"{case}, products in {dtype}"
            yield from context.compare(kernel, words, ours, operations=operations, dtype=wide)
            for theirs in _torch_candidates(stack):
                yield from context.compare(kernel, words, [theirs], operations=operations, dtype=wide)
        del stack
        context.release()


def _torch_candidates(stack: Tensor) -> list[Candidate]:
    """torch.optim.Muon's own iteration, which takes one matrix at a time."""
    iterate = find_torch_iteration()
    if iterate is None:
        return []
    matrices = list(stack.unbind(0))
    return [("torch.optim.Muon's iteration", False, lambda: [iterate(matrix) for matrix in matrices])]


def find_torch_iteration() -> Callable[[Tensor], Tensor] | None:
    """A private function of torch, so None where it is not."""
    try:
        from torch.optim._muon import _zeropower_via_newtonschulz
    except ImportError:
        return None
    return lambda matrix: _zeropower_via_newtonschulz(matrix, _COEFFICIENTS[0], len(_COEFFICIENTS), 1e-7)


ITEMS = (("polar", measure_polar),)
