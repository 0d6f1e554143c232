"""Kernels in JAX: traced once for each shape and static choice, and part of the same lazy graph as everything around.

JAX is imported when a kernel is first called. Numbers that change from step to step come in device vectors, so a new
learning rate traces and compiles nothing. Consumed tensors are left alone and new ones returned: in a graph that is
one step, the compiler reuses the memory of what nobody reads again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from windlass.accelerator.kernels import Kernel
from windlass.accelerator.polar import Coefficients

IMPLEMENTATION: Final = "jax"

Array = Any  # jax.Array; JAX is not there where this module is only imported
JaxFunction = Callable[..., Any]


def call(function: JaxFunction, *arguments: Tensor) -> Any:
    """Put a JAX function of tensors into the graph. Traces are kept by the function's identity, so that it must live
    as long as the process: let `functools.cache` make it, once for each static choice."""
    from torch_xla.core.xla_builder import call_jax

    return call_jax(function, arguments)


def adamw(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    gradient_scale: Tensor,
    keep: Tensor,
    low: Tensor | None,
    *,
    decoupled: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One AdamW update; see `reference.adamw`."""
    arguments = (weight, gradient, exp_avg, exp_avg_sq, scalars, gradient_scale, keep)
    if low is None:
        return (*call(_adamw(decoupled, False), *arguments), None)
    results: tuple[Tensor, Tensor, Tensor, Tensor] = call(_adamw(decoupled, True), *arguments, low)
    return results


@cache
def _adamw(decoupled: bool, with_low: bool) -> JaxFunction:
    import jax.numpy as jnp

    def update(
        weight: Array, gradient: Array, exp_avg: Array, exp_avg_sq: Array, scalars: Array, gradient_scale: Array,
        keep: Array, *low: Array,
    ) -> tuple[Array, ...]:  # fmt: skip
        numbers = collect_numbers(scalars, gradient_scale)
        w, m, v = update_elements(numbers, weight, gradient, exp_avg, exp_avg_sq, decoupled=decoupled)
        new = (jnp.where(keep, w, weight), jnp.where(keep, m, exp_avg), jnp.where(keep, v, exp_avg_sq))
        return (*new, *(jnp.where(keep, w.astype(each.dtype), each) for each in low))

    return update


def collect_numbers(scalars: Array, gradient_scale: Array) -> tuple[Array, ...]:
    """What an update of one element needs besides the vectors, for `update_elements`."""
    import jax.numpy as jnp

    lr, _beta1, rest1, beta2, rest2, eps, decay, correction1, correction2 = scalars
    shrink = 1 - _Rounding(lr)(lr * decay)
    return lr, shrink, decay, rest1, beta2, rest2, eps, lr / correction1, jnp.sqrt(correction2), gradient_scale


def update_elements(
    numbers: tuple[Array, ...], weight: Array, gradient: Array, exp_avg: Array, exp_avg_sq: Array, *, decoupled: bool
) -> tuple[Array, Array, Array]:
    """New weight, exp_avg and exp_avg_sq, each operation rounded in the order of the reference."""
    import jax.numpy as jnp

    lr, shrink, decay, rest1, beta2, rest2, eps, step, root2, scale = numbers
    rounded = _Rounding(lr)
    g = rounded(gradient.astype(jnp.float32) * scale)
    w = rounded(weight * shrink) if decoupled else weight
    if not decoupled:
        g = g + rounded(decay * weight)
    m = exp_avg + rounded(rest1 * (g - exp_avg))
    v = rounded(beta2 * exp_avg_sq) + rounded(rest2 * (g * g))
    w = w - rounded(step * (m / (jnp.sqrt(v) / root2 + eps)))
    return w, m, v


class _Rounding:
    """Products that are rounded before they are added to something.

    XLA's CPU fuses a product into one of the sums that use it, one or the other as a program happens to look, so that
    a slice would get other bits than the whole. It cannot where the bits of the product go through an exclusive or
    with a number that is zero, but that no compiler knows to be: whether a number of the caller is a nan.
    """

    def __init__(self, number: Array) -> None:
        import jax.numpy as jnp

        self._zero = (number != number).astype(jnp.int32)

    def __call__(self, product: Array) -> Array:
        import jax.numpy as jnp
        from jax import lax

        bits = lax.bitcast_convert_type(product, jnp.int32) ^ self._zero
        return lax.bitcast_convert_type(bits, jnp.float32)


def square_sum(values: Tensor, scale: Tensor) -> Tensor:
    """Sum of squares and a finite check; see `reference.square_sum`."""
    result: Tensor = call(_square_sum, values, scale)
    return result


_FOLD: Final = 8


def _square_sum(values: Array, scale: Array) -> Array:
    import jax.numpy as jnp

    scaled = values.astype(jnp.float32) * scale
    bad = ~jnp.isfinite(values).all()
    return jnp.stack([_add_up(scaled * scaled), bad.astype(jnp.float32)])


def _add_up(terms: Array) -> Array:
    """The sum of a vector, folded onto its eighths until few elements are left: pairwise, in an order that only the
    length decides, whatever order a compiler would give a long reduction; and in vector instructions."""
    rests = []
    while (count := terms.shape[0]) >= _FOLD:
        size = count // _FOLD
        rests.append(terms[_FOLD * size :].sum())
        a, b, c, d, e, f, g, h = (terms[row * size : (row + 1) * size] for row in range(_FOLD))
        terms = ((a + b) + (c + d)) + ((e + f) + (g + h))
    return sum(reversed(rests), terms.sum())


def scale_cast(destination: Tensor, source: Tensor, scale: Tensor) -> Tensor:
    """Scale in fp32 and round once into the dtype of `destination`; see `reference.scale_cast`.

    The destination gives its dtype only: a new tensor takes its place, and the old one need not even be computed.
    """
    if destination.shape != source.shape:
        raise ValueError(
            f"kernel 'scale_cast' got destination of shape {list(destination.shape)} and source of shape "
            f"{list(source.shape)}, wanted equal shapes; pass vectors of one length"
        )
    result: Tensor = call(_scale_cast(_name(destination.dtype)), source, scale)
    return result


@cache
def _scale_cast(dtype: str) -> JaxFunction:
    import jax.numpy as jnp

    return lambda source, scale: (source.astype(jnp.float32) * scale).astype(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def polar(stack: Tensor, coefficients: Coefficients, *, product_dtype: torch.dtype = torch.float32) -> Tensor:
    """Polar factors by Newton-Schulz in its standard form; see `reference.polar`."""
    result: Tensor = call(_polar(coefficients, _name(product_dtype)), stack)
    return result


@cache
def _polar(coefficients: Coefficients, product_dtype: str) -> JaxFunction:
    import jax.numpy as jnp
    from jax import lax

    dtype = jnp.dtype(product_dtype)

    def multiply(left: Array, right: Array, *, transposed: bool = False) -> Array:
        """Products of two stacks, their terms added in fp32; a processor of matrices must not round fp32 factors."""
        dimensions = (((2,), (2 if transposed else 1,)), ((0,), (0,)))
        return lax.dot_general(
            left.astype(dtype), right.astype(dtype), dimensions,
            precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
        )  # fmt: skip

    def orthogonalize(stack: Array) -> Array:
        x = stack.astype(jnp.float32)
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        if x.size:
            x = x / _unless_zero(jnp.abs(x).max((1, 2), keepdims=True))
            x = x / _unless_zero(jnp.sqrt((x * x).sum((1, 2), keepdims=True)))
        for a, b, c in coefficients:
            gram = multiply(x, x, transposed=True)
            x = a * x + multiply(b * gram + c * multiply(gram, gram), x)
        return (x.mT if tall else x).astype(stack.dtype)

    return orthogonalize


def _unless_zero(divisor: Array) -> Array:
    import jax.numpy as jnp

    return jnp.where(divisor == 0, 1, divisor)


def xla_kernels() -> tuple[Kernel, ...]:
    """The kernels in JAX and Pallas for the client that torch_xla has opened."""
    import torch_xla.runtime

    from windlass.backends.xla.pallas_kernels import pallas_kernels

    functions = (("adamw", adamw), ("square_sum", square_sum), ("scale_cast", scale_cast), ("polar", polar))
    return (
        *(Kernel(name, IMPLEMENTATION, function, priority=100) for name, function in functions),
        *pallas_kernels(on_tpu=torch_xla.runtime.device_type() == "TPU"),
    )
