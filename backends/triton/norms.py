"""LayerNorm and RMSNorm over the rows of a matrix.

What goes back to weight and bias is added up by a number of programs that depends on the shape alone, each over its own
rows, and their sums are added up in one order: the same bits on every device.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
from torch import Tensor

from windlass.accelerator.kernels import Kernel
from windlass.backends.triton.launch import IMPLEMENTATION, TYPE_NAMES, Variant, launch
from windlass.backends.triton.norm_variants import (
    COLUMNS,
    LONGEST,
    PARTIALS,
    PROGRAMS,
    SHORTEST,
    TILE,
    make_addition,
    make_backward,
    make_forward,
    make_long_backward,
    make_long_sums,
)

_FLOATS: Final = tuple(TYPE_NAMES)


def rms_norm(input: Tensor, weight: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.rms_norm`."""
    output, _, rstd = _normalize("rms_norm", input, weight, None, eps, centred=False)
    return output, rstd


def layer_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.layer_norm`."""
    output, mean, rstd = _normalize("layer_norm", input, weight, bias, eps, centred=True)
    assert mean is not None
    return output, mean, rstd


def rms_norm_backward(
    output_gradient: Tensor, input: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor | None]:
    """See `reference.rms_norm_backward`."""
    back, weight_gradient, _ = _differentiate("rms_norm_backward", output_gradient, input, weight, None, rstd, False)
    return back, weight_gradient


def layer_norm_backward(
    output_gradient: Tensor, input: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, *, bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `reference.layer_norm_backward`."""
    return _differentiate("layer_norm_backward", output_gradient, input, weight, mean, rstd, bias)


def _normalize(
    kernel: str, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, centred: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    _require_matrix(kernel, input)
    tokens, size = input.shape
    for name, vector in (("weight", weight), ("bias", bias)):
        _require_vector(kernel, name, vector, size, weight.dtype if weight is not None and vector is bias else None)
    output = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    rstd = torch.empty(tokens, dtype=torch.float32, device=input.device)
    mean = torch.empty_like(rstd) if centred else None
    long = size > LONGEST
    variant = make_forward(input.dtype, _dtype(weight), _dtype(bias), centred, _block(size), long=long)
    given: dict[str, Any] = {
        "output": output,
        "mean": mean,
        "rstd": rstd,
        "input": input.contiguous(),
        "weight": weight,
        "bias": bias,
    }
    given |= {"tokens": tokens, "size": size, "count": float(size), "eps": eps}
    if tokens:
        groups = triton.cdiv(tokens, variant.constants.get("ROWS", 1))
        launch(variant, (groups,), input.device, **_of(variant, given))
    return output, mean, rstd


def _differentiate(
    kernel: str,
    output_gradient: Tensor,
    input: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    _require_matrix(kernel, input)
    tokens, size = input.shape
    if output_gradient.shape != input.shape or output_gradient.dtype is not input.dtype:
        raise ValueError(
            f"kernel {kernel!r} got output_gradient as {output_gradient.dtype}{list(output_gradient.shape)}, wanted it "
            f"as input, {input.dtype}{list(input.shape)}; it is the gradient of an output that has input's dtype"
        )
    _require_vector(kernel, "weight", weight, size, None)
    for name, vector in (("mean", mean), ("rstd", rstd)):
        _require_vector(kernel, name, vector, tokens, torch.float32)
    device, block = input.device, _block(size)
    back = torch.empty(input.shape, dtype=input.dtype, device=device)
    programs = max(1, min(triton.cdiv(tokens, max(1, TILE // block)), PARTIALS // block, PROGRAMS))
    sums = {
        name: torch.empty(programs, size, dtype=torch.float32, device=device) if wanted else None
        for name, wanted in (("weight_sums", weight is not None), ("bias_sums", bias))
    }
    given: dict[str, Any] = {
        "input_gradient": back,
        "output_gradient": output_gradient.contiguous(),
        "input": input.contiguous(),
    }
    given |= {**sums, "weight": weight, "mean": mean, "rstd": rstd}
    given |= {"tokens": tokens, "size": size, "count": float(size)}
    dtype, centred = _dtype(weight), mean is not None
    if tokens and size <= LONGEST:
        variant = make_backward(input.dtype, dtype, bias, centred, block)
        launch(variant, (programs,), device, **_of(variant, given))
    elif tokens:
        variant = make_long_backward(input.dtype, dtype, centred)
        launch(variant, (tokens,), device, **_of(variant, given))
        if bias or weight is not None:
            variant = make_long_sums(input.dtype, weight is not None, bias, centred)
            launch(variant, (programs, triton.cdiv(size, TILE)), device, **_of(variant, given))
    added = [
        None if one is None else _add_up(one, programs if tokens else 0, dtype or torch.float32)
        for one in sums.values()
    ]
    return back, added[0], added[1]


def _add_up(partials: Tensor, programs: int, dtype: torch.dtype) -> Tensor:
    """The sum of the first rows, rounded once."""
    size = partials.shape[1]
    result = torch.empty(size, dtype=dtype, device=partials.device)
    if size:
        given = {"result": result, "partials": partials, "programs": programs, "size": size}
        launch(make_addition(dtype), (triton.cdiv(size, COLUMNS),), partials.device, **given)
    return result


def _of(variant: Variant, given: dict[str, Any]) -> dict[str, Any]:
    """What the program takes of it; its constants come with the variant."""
    return {name: given[name] for name in variant.signature if name not in variant.constants}


def _block(size: int) -> int:
    """The power of two that holds a row, within the limits of what is compiled."""
    return min(max(1 << (size - 1).bit_length(), SHORTEST), LONGEST) if size else SHORTEST


def _dtype(vector: Tensor | None) -> torch.dtype | None:
    return None if vector is None else vector.dtype


def _require_matrix(kernel: str, input: Tensor) -> None:
    if input.dim() != 2 or input.dtype not in _FLOATS or input.shape[1] >= 2**24:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _FLOATS)
        raise ValueError(
            f"kernel {kernel!r} got input as {input.dtype}{list(input.shape)}, wanted [tokens, size] of {names} with a "
            "size below 2^24; flatten the leading dimensions"
        )


def _require_vector(kernel: str, name: str, vector: Tensor | None, count: int, dtype: torch.dtype | None) -> None:
    """Raise ValueError unless a vector, if there is one, is contiguous, of `dtype` or any float, and of `count`."""
    if vector is None:
        return
    wanted = _FLOATS if dtype is None else (dtype,)
    if vector.shape != (count,) or vector.dtype not in wanted or not vector.is_contiguous():
        names = " or ".join(str(one).removeprefix("torch.") for one in wanted)
        raise ValueError(
            f"kernel {kernel!r} got {name} as {vector.dtype}{list(vector.shape)} with strides {vector.stride()}, "
            f"wanted contiguous {names}[{count}]; pass one element for each of the other tensors' rows or columns"
        )


_SIXTEEN: Final = torch.bfloat16
_BLOCKS: Final = (128, 256, 512, 1024, 2048, 4096, 8192)
_MIXED: Final = (
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (_SIXTEEN, torch.float32),
    (_SIXTEEN, None),
)

VARIANTS: tuple[Variant, ...] = (
    *(make_forward(_SIXTEEN, _SIXTEEN, _SIXTEEN, True, block, long=False) for block in _BLOCKS),
    *(make_forward(_SIXTEEN, _SIXTEEN, None, False, block, long=False) for block in _BLOCKS),
    *(make_forward(one, other, other, True, 1024, long=False) for one, other in _MIXED),
    *(make_forward(one, other, None, False, 1024, long=False) for one, other in _MIXED),
    *(make_forward(_SIXTEEN, _SIXTEEN, None, centred, LONGEST, long=True) for centred in (True, False)),
    *(make_backward(_SIXTEEN, _SIXTEEN, True, True, block) for block in _BLOCKS),
    *(make_backward(_SIXTEEN, _SIXTEEN, False, False, block) for block in _BLOCKS),
    *(make_backward(one, other, centred, centred, 8192) for one, other in _MIXED for centred in (True, False)),
    *(make_long_backward(_SIXTEEN, _SIXTEEN, centred) for centred in (True, False)),
    *(make_long_sums(_SIXTEEN, True, centred, centred) for centred in (True, False)),
    *(make_addition(dtype) for dtype in _FLOATS),
)

KERNELS: tuple[Kernel, ...] = tuple(
    Kernel(name, IMPLEMENTATION, function)
    for name, function in (
        ("rms_norm", rms_norm),
        ("rms_norm_backward", rms_norm_backward),
        ("layer_norm", layer_norm),
        ("layer_norm_backward", layer_norm_backward),
    )
)
