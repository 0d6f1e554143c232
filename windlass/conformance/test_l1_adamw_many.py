"""Level 1: adamw_many: many vectors in one call, each to the bit as adamw updates it by itself."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.accelerator.kernels import REFERENCE
from windlass.conformance.allocations import assert_holds, bring, dtype_named
from windlass.conformance.kernel_cases import (
    KEEP,
    SKIP,
    AdamwState,
    bound_adamw,
    make_scalars,
    make_state,
    measure_adamw,
)
from windlass.conformance.kernel_runs import (
    SLICED,
    KernelFunction,
    assert_same_state,
    each_implementation,
    keeps_subnormal_numbers,
    run_adamw,
)
from windlass.conformance.requirements import requires

KERNEL = "adamw_many"
NARROW = pytest.mark.parametrize("narrow", ["none", "bfloat16", "float16"])
DECOUPLED = pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "l2"])
SCALE = torch.tensor(0.7)
COUNTS = (1003, 0, 1, 64, 517, 2048, 0, 4099)
ROWS = (0, 1, 1, 0, 2, 2, 0, 1)
SCALARS = torch.stack([
    make_scalars(3),
    make_scalars(1, lr=0.3, betas=(0.8, 0.9), weight_decay=0.2),
    make_scalars(999, lr=2e-5, eps=1e-4, weight_decay=0.0),
])  # fmt: skip
"""Three rows, of groups with little in common."""


def make_parts(narrow: torch.dtype | None) -> list[AdamwState]:
    """Vectors of many lengths; where a narrow dtype is given, gradients and low copies in every combination."""
    dtypes = [torch.float32] if narrow is None else [torch.float32, narrow]
    lows = [None] if narrow is None else [None, narrow]
    kinds = itertools.cycle(itertools.product(dtypes, lows))
    return [
        make_state(count, *kind, seed=index) for index, (count, kind) in enumerate(zip(COUNTS, kinds, strict=False))
    ]


def update_many(
    kernel: KernelFunction,
    parts: Sequence[AdamwState],
    scalars: Tensor,
    rows: Sequence[int],
    scale: Tensor,
    keep: Tensor,
    *,
    decoupled: bool = True,
) -> None:
    """Run the kernel on the vectors of the parts and keep what it returns."""
    given = [(one.weight, one.gradient, one.exp_avg, one.exp_avg_sq, one.low) for one in parts]
    results = kernel(given, scalars, rows, scale, keep, decoupled=decoupled)
    for one, (weight, exp_avg, exp_avg_sq, low) in zip(parts, results, strict=True):
        one.weight, one.exp_avg, one.exp_avg_sq, one.low = weight, exp_avg, exp_avg_sq, low


def run_many(
    accelerator: Accelerator,
    kernel: KernelFunction,
    parts: Sequence[AdamwState],
    scalars: Tensor = SCALARS,
    rows: Sequence[int] = ROWS,
    scale: Tensor = SCALE,
    keep: Tensor = KEEP,
    *,
    decoupled: bool = True,
) -> list[AdamwState]:
    """The parts after one update on the device, back on the host. What is not consumed must be as it was."""
    hosts = {"scalars": scalars, "scale": scale, "keep": keep}
    there = {name: bring(accelerator, host) for name, host in hosts.items()}
    on_device = [one.on(accelerator.device) for one in parts]
    update_many(kernel, on_device, there["scalars"], rows, there["scale"], there["keep"], decoupled=decoupled)
    for name, host in hosts.items():
        assert_holds(accelerator, there[name], host, f"{name}, which {KERNEL} does not consume,")
    for one, before in zip(on_device, parts, strict=True):
        assert (one.low is None) == (before.low is None)
        assert_holds(accelerator, one.gradient, before.gradient, f"a gradient, which {KERNEL} does not consume,")
    return [one.fetch(accelerator.to_host) for one in on_device]


def check_parts(
    accelerator: Accelerator,
    implementation: str,
    found: Sequence[AdamwState],
    before: Sequence[AdamwState],
    rows: Sequence[int] = ROWS,
    scalars: Tensor = SCALARS,
    *,
    decoupled: bool = True,
) -> None:
    """Each part has the bits of the adamw that goes with the implementation: the one of its name, or, where it is made
    of other kernels, the chosen one. It is within the bounds if that is the reference of a lazy device, whose compiler
    rounds or not as what is around suggests."""
    kernels = accelerator.kernels
    (own,) = (one for one in kernels.implementations(KERNEL) if one.implementation == implementation)
    chosen = kernels.chosen()["adamw"]
    name = chosen if own.composed else implementation
    exact = name != REFERENCE or not accelerator.capabilities.lazy
    vanishing = 0.0 if keeps_subnormal_numbers(accelerator) else 2.0**-126
    kernels.choose("adamw", name)
    try:
        adamw = kernels["adamw"]
        for index, (one, state, row) in enumerate(zip(found, before, rows, strict=True)):
            if exact:
                wanted = run_adamw(accelerator, adamw, state, scalars[row], SCALE, decoupled=decoupled)
                assert_same_state(one, wanted, f"of {implementation}, part {index} of {state.weight.numel()} elements")
            else:
                bounds = bound_adamw(state, scalars[row], SCALE, decoupled=decoupled, vanishing=vanishing)
                assert max(measure_adamw(one, bounds).values()) <= 1, f"part {index}"
    finally:
        kernels.choose("adamw", chosen)


@requires(
    level=1,
    must="adamw_many updates vectors of any lengths, dtypes and rows of scalars in one call, each to the bit as adamw "
    "does.",
    needs=lambda narrow: () if narrow == "none" else f"dtypes:{narrow}",
    since="1.1",
)
@DECOUPLED
@NARROW
def test_equals_one_by_one(accelerator: Accelerator, narrow: str, decoupled: bool) -> None:
    parts = make_parts(None if narrow == "none" else dtype_named(narrow))
    with each_implementation(accelerator, KERNEL) as turns:
        for implementation, kernel in turns:
            found = run_many(accelerator, kernel, parts, decoupled=decoupled)
            check_parts(accelerator, implementation, found, parts, decoupled=decoupled)


@requires(level=1, must="adamw_many of no vectors, or of empty ones only, gives as many back.", since="1.1")
def test_nothing_to_update(accelerator: Accelerator) -> None:
    empty = [make_state(0, low=None), make_state(0, low=None)]
    with each_implementation(accelerator, KERNEL) as turns:
        for implementation, kernel in turns:
            assert run_many(accelerator, kernel, [], rows=()) == [], implementation
            for one, before in zip(run_many(accelerator, kernel, empty, rows=(2, 0)), empty, strict=True):
                assert_same_state(one, before, f"of {implementation}")


@requires(
    level=1,
    must="adamw_many updates slices that lie beside each other, aligned or not, and writes nothing between them.",
    since="1.1",
)
def test_slices_of_one_vector(accelerator: Accelerator) -> None:
    """Parts are slices of one allocation, as they are where parameters of several groups share a region."""
    state = make_state(SLICED, low=None)
    apart = [(5, 5), (0, 1), (1, 8), (32, 1056), (1057, 1058), (1059, 2100)]
    rows = [index % len(SCALARS) for index in range(len(apart))]
    with each_implementation(accelerator, KERNEL) as turns:
        for implementation, kernel in turns:
            whole = state.on(accelerator.device)
            parts = [whole.slice(*bounds) for bounds in apart]
            scalars, scale, keep = (bring(accelerator, one) for one in (SCALARS, SCALE, KEEP))
            update_many(kernel, parts, scalars, rows, scale, keep)
            found = [one.fetch(accelerator.to_host) for one in parts]
            check_parts(accelerator, implementation, found, [state.slice(*bounds) for bounds in apart], rows)
            for bounds in ((8, 32), (1056, 1057), (1058, 1059), (2100, SLICED)):
                around = whole.slice(*bounds).fetch(accelerator.to_host)
                assert_same_state(around, state.slice(*bounds), f"of {implementation} at {bounds}, beside the parts,")


@requires(
    level=1,
    must="adamw_many takes its numbers and its vectors anew in every call: what it knows of a call before decides "
    "nothing.",
    since="1.1",
)
def test_calls_after_each_other(accelerator: Accelerator) -> None:
    """First other numbers in the same tensors, then fewer vectors, then the vectors in another order."""
    parts = make_parts(None)
    other = SCALARS.flip(0).contiguous()
    with each_implementation(accelerator, KERNEL) as turns:
        for implementation, kernel in turns:
            on_device = [one.on(accelerator.device) for one in parts]
            scalars, scale, keep = (bring(accelerator, one) for one in (SCALARS, SCALE, KEEP))
            before = [one.copy() for one in parts]
            calls = ((SCALARS, list(range(8))), (other, list(range(8))), (other, [5, 0, 3]), (SCALARS, [7, 6, 5, 4, 3]))
            for numbers, chosen in calls:
                scalars.copy_(numbers)
                turn, rows = [on_device[index] for index in chosen], [ROWS[index] for index in chosen]
                given = [before[index] for index in chosen]
                update_many(kernel, turn, scalars, rows, scale, keep)
                found = [one.fetch(accelerator.to_host) for one in turn]
                check_parts(accelerator, implementation, found, given, rows, numbers)
                for index, one in zip(chosen, found, strict=True):
                    before[index] = one


@requires(
    level=1,
    must="adamw_many that may not keep its results leaves every vector as it was, whatever the gradients hold.",
    needs=lambda narrow: () if narrow == "none" else f"dtypes:{narrow}",
    since="1.1",
)
@NARROW
def test_skipped_update(accelerator: Accelerator, narrow: str) -> None:
    parts = make_parts(None if narrow == "none" else dtype_named(narrow))
    broken = [one.copy() for one in parts]
    for one in broken:
        one.gradient[::7] = math.nan
        one.gradient[1::9] = math.inf
    with each_implementation(accelerator, KERNEL) as turns:
        for implementation, kernel in turns:
            for before, scale in itertools.product((parts, broken), (SCALE, torch.tensor(math.nan))):
                found = run_many(accelerator, kernel, before, scale=scale, keep=SKIP)
                for one, wanted in zip(found, before, strict=True):
                    assert_same_state(one, wanted, f"of {implementation} after a skipped update")
            control = run_many(accelerator, kernel, parts)
            assert not torch.equal(control[0].weight, parts[0].weight)


@requires(
    level=1,
    must="A gradient that is not finite spoils its own element of its own vector of adamw_many and no other.",
    since="1.1",
)
def test_gradient_that_is_not_finite(accelerator: Accelerator) -> None:
    parts = make_parts(None)
    broken = [one.copy() for one in parts]
    broken[4].gradient[516], broken[5].gradient[0] = math.nan, math.inf
    spoilt = {(4, 516), (5, 0)}
    with each_implementation(accelerator, KERNEL) as turns:
        for implementation, kernel in turns:
            wanted, found = run_many(accelerator, kernel, parts), run_many(accelerator, kernel, broken)
            for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
                for name in ("weight", "exp_avg", "exp_avg_sq"):
                    values = getattr(one, name)
                    different = (values != getattr(other, name)).nonzero().flatten().tolist()
                    places = {(index, place) for place in different}
                    assert not values[different].isfinite().any(), f"{implementation}: {name}"
                    assert places == {each for each in spoilt if each[0] == index}, f"{implementation}: {name}"
