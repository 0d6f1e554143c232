"""Kernels in JAX and Pallas: traced and compiled once, one program with what is around them, ready for a TPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_xla.core.xla_builder as builder
from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.accelerator.kernels import Kernels
from windlass.accelerator.polar import COEFFICIENTS
from windlass.accelerator.reference import SCHEMAS, reference_kernels
from windlass.backends.xla.device import XlaAccelerator, open_torch_xla
from windlass.backends.xla.kernels import adamw, polar, scale_cast, square_sum, xla_kernels
from windlass.backends.xla.pallas_kernels import BLOCK, make_adamw, make_update, pallas_kernels
from windlass.conformance.kernel_cases import (
    KEEP,
    ONE,
    SKIP,
    AdamwState,
    adamw_rounded_stepwise,
    bound_adamw,
    equal_bits,
    make_scalars,
    make_state,
    measure_adamw,
)

UPDATES: dict[str, Callable[..., Any]] = {"jax": adamw, "pallas": make_adamw(interpret=True)}


@pytest.fixture(scope="module")
def accelerator() -> Iterator[XlaAccelerator]:
    opened = open_torch_xla()
    yield opened
    opened.close()


def bring(accelerator: XlaAccelerator, *host: Tensor) -> list[Tensor]:
    return [each.to(accelerator.device) for each in host]


def update(accelerator: XlaAccelerator, function: Any, state: AdamwState, scalars: Tensor, keep: Tensor) -> AdamwState:
    on_device = state.on(accelerator.device)
    on_device.update(function, *bring(accelerator, scalars, ONE, keep))
    return on_device.fetch(accelerator.to_host)


def test_importing_the_kernels_imports_neither_jax_nor_torch_xla() -> None:
    code = (
        "import sys, windlass.backends.xla.kernels, windlass.backends.xla.pallas_kernels; "
        "print([name for name in ('jax', 'torchax', 'torch_xla') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout == "[]\n"


def test_jax_starts_the_processor_only_and_warns_of_nothing() -> None:
    code = """
import torch
from windlass.backends.xla.device import open_torch_xla
accelerator = open_torch_xla()
assert accelerator.to_host(accelerator.kernels["square_sum"](torch.ones(5, device=accelerator.device),
                                                             torch.ones((), device=accelerator.device)))[0] == 5
assert accelerator.kernels.chosen()["square_sum"] == "jax"
from jax._src import xla_bridge
print(sorted(xla_bridge.backends()))
accelerator.close()
"""
    environment = {**os.environ, "PJRT_DEVICE": "CPU"}
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == "['cpu']\n"
    assert "Warning" not in found.stderr, found.stderr


def test_numbers_that_change_from_step_to_step_neither_trace_nor_compile(accelerator: XlaAccelerator) -> None:
    state = make_state(1000).on(accelerator.device)
    stack, source = bring(accelerator, torch.rand(2, 8, 12), torch.rand(1000))
    seen = []
    for step in range(1, 6):
        scalars, scale, keep = bring(
            accelerator, make_scalars(step, lr=0.1 / step), torch.tensor(1.0 / step), torch.tensor(step != 4)
        )
        for decoupled in (True, False):
            state.update(adamw, scalars, scale, keep, decoupled=decoupled)
        total = square_sum(source, scale)
        cast = scale_cast(torch.empty(1000, dtype=torch.bfloat16, device=accelerator.device), source, scale)
        factors = polar(stack, COEFFICIENTS["jordan"], product_dtype=torch.bfloat16)
        accelerator.streams.boundary()
        accelerator.streams.synchronize()
        seen.append((accelerator.program_counts(), builder._jax_to_xla_computation_cache_elements()))
        assert all(each.isfinite().all() for each in map(accelerator.to_host, (total, cast, factors)))
    compiled = [counts.compiled for counts, _ in seen]
    traced = [number for _, number in seen]
    assert compiled[2:] == compiled[2:3] * 3, compiled
    assert traced == traced[:1] * 5, traced


def test_kernels_and_what_is_around_them_are_one_program(accelerator: XlaAccelerator) -> None:
    values, one = bring(accelerator, torch.rand(4, 16), ONE)
    accelerator.streams.boundary()
    accelerator.streams.synchronize()
    before = accelerator.program_counts().executed
    total = square_sum((values * 2).flatten(), one)[0]
    factors = polar((values / total.sqrt()).reshape(1, 4, 16), COEFFICIENTS["you"]) + 1
    accelerator.streams.boundary()
    accelerator.streams.synchronize()
    assert accelerator.program_counts().executed == before + 1
    assert accelerator.to_host(factors).isfinite().all()


@pytest.mark.parametrize("implementation", UPDATES)
def test_results_with_and_without_a_narrow_copy_do_not_mix(accelerator: XlaAccelerator, implementation: str) -> None:
    """A trace of one is not to be taken for the other, in either order."""
    for low in (None, torch.bfloat16, None, torch.bfloat16):
        found = update(accelerator, UPDATES[implementation], make_state(9, low=low), make_scalars(1), KEEP)
        assert (found.low is None) == (low is None)
        if found.low is not None:
            assert torch.equal(found.low, found.weight.bfloat16())


@pytest.mark.parametrize("implementation", UPDATES)
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
def test_adamw_rounds_each_operation_as_the_standard_says(
    accelerator: XlaAccelerator, implementation: str, gradient: torch.dtype, decoupled: bool
) -> None:
    """So weights are equal to the bit wherever an update is compiled by such rules, as on the processor's backend."""
    state, scalars, scale = make_state(5003, gradient), make_scalars(4, weight_decay=0.1), torch.tensor(0.7)
    wanted = adamw_rounded_stepwise(state, scalars, scale, decoupled=decoupled)
    on_device = state.on(accelerator.device)
    given = bring(accelerator, scalars, scale, KEEP)
    on_device.update(UPDATES[implementation], *given, decoupled=decoupled)
    found = on_device.fetch(accelerator.to_host)
    assert all(map(equal_bits, (found.weight, found.exp_avg, found.exp_avg_sq), wanted))


@pytest.mark.parametrize("count", [1, 127, 1024, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 1000])
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
def test_pallas_updates_whole_blocks_and_the_rest(
    accelerator: XlaAccelerator, count: int, gradient: torch.dtype
) -> None:
    state, scalars = make_state(count, gradient), make_scalars(5, weight_decay=0.1)
    bounds = bound_adamw(state, scalars, ONE, decoupled=True, vanishing=2.0**-126)
    found = update(accelerator, UPDATES["pallas"], state, scalars, KEEP)
    shares = measure_adamw(found, bounds)
    assert max(shares.values()) <= 1, shares
    assert found.low is not None
    assert torch.equal(found.low, found.weight.bfloat16())
    assert update(accelerator, UPDATES["pallas"], state, scalars, SKIP).bits() == state.bits()


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("gradient", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [1000, 10 * BLOCK + 77])
def test_pallas_lowers_for_a_tpu_and_writes_in_place(count: int, gradient: str, decoupled: bool) -> None:
    import jax
    import jax.numpy as jnp

    def vector(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((count,), dtype)

    wide = vector(jnp.float32)
    arguments = (
        jax.ShapeDtypeStruct((9,), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.bool_),
        wide, vector(jnp.dtype(gradient)), wide, wide, vector(jnp.bfloat16),
    )  # fmt: skip
    traced = jax.jit(make_update(decoupled, False, True)).trace(*arguments)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 1
    assert text.count("output_operand_alias<") == 4


def test_pallas_goes_first_on_a_tpu_and_after_jax_elsewhere() -> None:
    here = Kernels(SCHEMAS, (*reference_kernels(), *xla_kernels()), Counters())
    in_jax = ("adamw", "polar", "scale_cast", "square_sum")
    assert here.chosen() == {schema.name: "jax" if schema.name in in_jax else "reference" for schema in SCHEMAS}
    assert {each.implementation for each in here.implementations("adamw")} == {"jax", "pallas", "reference"}
    there = Kernels(SCHEMAS, reference_kernels(), Counters())
    for kernel in (*(each for each in xla_kernels() if each.implementation == "jax"), *pallas_kernels(on_tpu=True)):
        there.register(kernel)
    assert there.chosen()["adamw"] == "pallas"


def test_a_long_sum_of_equal_terms_is_exact(accelerator: XlaAccelerator) -> None:
    """Folding adds equal parts, whose doubles are exact; one after the other they would be off in the fifth digit."""
    count = 2**22 + 5
    values, one = bring(accelerator, torch.full((count,), 1.5), ONE)
    total, bad = accelerator.to_host(square_sum(values, one)).tolist()
    assert bad == 0
    assert total == pytest.approx(2.25 * count, rel=1e-7)
