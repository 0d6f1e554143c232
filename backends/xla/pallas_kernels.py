"""AdamW in Pallas: one pass over blocks of the vectors, each byte read and written once, and written where it was read.

On a TPU it is chosen before the kernel that the compiler makes of the same arithmetic; it lowers for a TPU, but has
not yet run on one. Elsewhere Pallas interprets it, which is for tests: there every other implementation goes first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Final

from torch import Tensor

from windlass.accelerator.kernels import Kernel
from windlass.backends.xla.kernels import Array, JaxFunction, call, collect_numbers, update_elements

IMPLEMENTATION: Final = "pallas"
BLOCK: Final = 64 * 1024
"""Elements: seven vectors of 256 KiB, twice, since one block moves while another is computed; a core has 16 MiB."""

_Adamw = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]


def make_adamw(*, interpret: bool) -> _Adamw:
    """The kernel adamw; `interpret` runs it without a TPU."""

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
        arguments = (scalars, gradient_scale, keep, weight, gradient, exp_avg, exp_avg_sq)
        if low is None:
            return (*call(make_update(decoupled, interpret, False), *arguments), None)
        results: tuple[Tensor, Tensor, Tensor, Tensor]
        results = call(make_update(decoupled, interpret, True), *arguments, low)
        return results

    return adamw


@cache
def make_update(decoupled: bool, interpret: bool, with_low: bool) -> JaxFunction:
    """The update as a JAX function of (scalars, gradient_scale, keep, weight, gradient, exp_avg, exp_avg_sq, low or
    nothing). The number of results depends on `with_low`, and call_jax remembers it by function."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas
    from jax.experimental.pallas import tpu

    def update(scalars: Array, gradient_scale: Array, keep: Array, *vectors: Array) -> tuple[Array, ...]:
        weight, _, exp_avg, exp_avg_sq, *low = vectors
        results = (weight, exp_avg, exp_avg_sq, *low)
        count = weight.shape[0]
        if count == 0:
            return results
        numbers = jnp.stack([*collect_numbers(scalars, gradient_scale), keep.astype(jnp.float32)])
        size = min(BLOCK, count)
        block = pallas.BlockSpec((size,), lambda i: (i,))
        updated: tuple[Array, ...] = pallas.pallas_call(
            partial(_update_block, decoupled),
            grid=(pallas.cdiv(count, size),),
            in_specs=[pallas.BlockSpec(memory_space=tpu.SMEM), *(block for _ in vectors)],
            out_specs=[block for _ in results],
            out_shape=[jax.ShapeDtypeStruct(each.shape, each.dtype) for each in results],
            input_output_aliases={1: 0, 3: 1, 4: 2, **({5: 3} if low else {})},
            interpret=interpret,
            name="adamw",
        )(numbers, *vectors)
        return tuple(updated)

    return update


def _update_block(decoupled: bool, numbers: Any, *blocks: Any) -> None:
    """A block of each vector, given and returned; the last of both is the narrow copy, where there is one."""
    import jax.numpy as jnp

    given, returned = blocks[: (len(blocks) + 1) // 2], blocks[(len(blocks) + 1) // 2 :]
    *scalars, kept = (numbers[i] for i in range(numbers.shape[0]))
    keep = kept != 0
    weight, gradient, exp_avg, exp_avg_sq = (block[...] for block in given[:4])
    w, m, v = update_elements(tuple(scalars), weight, gradient, exp_avg, exp_avg_sq, decoupled=decoupled)
    for block, new, old in zip(returned, (w, m, v), (weight, exp_avg, exp_avg_sq), strict=False):
        block[...] = jnp.where(keep, new, old)
    if len(returned) == 4:
        low = given[4][...]
        returned[3][...] = jnp.where(keep, w.astype(low.dtype), low)


def pallas_kernels(*, on_tpu: bool) -> tuple[Kernel, ...]:
    """The kernels in Pallas, before all others on a TPU and after the ones in JAX elsewhere."""
    return (Kernel("adamw", IMPLEMENTATION, make_adamw(interpret=not on_tpu), priority=200 if on_tpu else 10),)
