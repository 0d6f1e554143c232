"""Level 1: linear_cross_entropy, its losses and gradients within their bounds, however tokens are cut into chunks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.conformance.allocations import assert_holds, bring, dtype_named
from windlass.conformance.cross_entropy_cases import IGNORED, CrossEntropyCase, bound_cross_entropy, make_case
from windlass.conformance.kernel_runs import each_implementation
from windlass.conformance.norm_cases import shares_of
from windlass.conformance.plugin import Measure
from windlass.conformance.requirements import requires

NAME = "linear_cross_entropy"
DTYPE = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


def run(
    accelerator: Accelerator,
    kernel: Any,
    case: CrossEntropyCase,
    chunk: int = 16,
    *,
    hidden: bool = True,
    weight: bool = True,
) -> dict[str, Tensor]:
    """The results on the host, those that are wanted; what went in must be as it was."""
    host = [case.hidden, case.weight, case.targets, case.scales]
    given = [None if one is None else bring(accelerator, one) for one in host]
    results = kernel(*given, ignore_index=IGNORED, chunk=chunk, hidden_gradient=hidden, weight_gradient=weight)
    for name, one, before in zip(("hidden", "weight", "targets", "scales"), given, host, strict=True):
        if one is not None and before is not None:
            assert_holds(accelerator, one, before, f"{name}, which {NAME} does not consume,")
    assert [one is not None for one in results] == [True, hidden, weight]
    names = ("losses", "hidden_gradient", "weight_gradient")
    found = {name: accelerator.to_host(one) for name, one in zip(names, results, strict=True) if one is not None}
    kept = torch.float32 if case.hidden.dtype is torch.float16 else case.hidden.dtype
    wanted = {
        "losses": (case.targets.shape, torch.float32),
        "hidden_gradient": (case.hidden.shape, kept),
        "weight_gradient": (case.weight.shape, kept),
    }
    for name, one in found.items():
        assert (one.shape, one.dtype) == wanted[name], name
    return found


def check_bounds(
    accelerator: Accelerator, measure: Measure, case: CrossEntropyCase, what: str, chunk: int = 16, **wanted: bool
) -> None:
    """Every implementation against the tolerance of the schema; the worst is noted."""
    bounds = bound_cross_entropy(case)
    with each_implementation(accelerator, NAME) as turns:
        for implementation, kernel in turns:
            found = run(accelerator, kernel, case, chunk, **wanted)
            shares = {name: float(shares_of(one, bounds[name]).max(initial=0)) for name, one in found.items()}
            measure(
                "kernel", name=NAME, implementation=implementation, case=what, error=max(shares.values()), bound=1.0,
                unit="of the allowed error",
            )  # fmt: skip
            assert max(shares.values()) <= 1, f"{implementation}, {what}: shares of what is allowed are {shares}"


@requires(
    level=1,
    must="linear_cross_entropy gives each token's loss and the gradients of their sum, whatever the dtype.",
    needs=lambda dtype: f"dtypes:{dtype}",
    since="1.1",
)
@DTYPE
@pytest.mark.parametrize("spread", [2.0, 30.0])
def test_bounds(accelerator: Accelerator, measure: Measure, dtype: str, spread: float) -> None:
    for tokens, size, vocabulary in ((40, 96, 300), (5, 3, 2)):
        case = make_case(tokens, size, vocabulary, dtype=dtype_named(dtype), spread=spread, seed=size)
        what = f"{tokens} x {size}, vocabulary {vocabulary}, {dtype}, logits of {spread:g}"
        check_bounds(accelerator, measure, case, what)


@requires(level=1, must="linear_cross_entropy gives the same however many tokens a chunk has.", since="1.1")
@pytest.mark.parametrize("chunk", [1, 9, 1000])
def test_chunks(accelerator: Accelerator, measure: Measure, chunk: int) -> None:
    check_bounds(accelerator, measure, make_case(18, 20, 70, seed=1), f"{chunk} tokens at a time", chunk)


@requires(
    level=1, must="linear_cross_entropy of a vocabulary that is no power of two is within its bounds.", since="1.1"
)
def test_larger_vocabulary(accelerator: Accelerator, measure: Measure) -> None:
    check_bounds(accelerator, measure, make_case(3, 8, 5003, seed=2), "vocabulary 5003")


@requires(
    level=1, must="linear_cross_entropy counts tokens in its gradients by their scales, and in no loss.", since="1.1"
)
def test_scales(accelerator: Accelerator, measure: Measure) -> None:
    check_bounds(accelerator, measure, make_case(20, 16, 60, scaled=True, seed=3), "scaled")


@requires(level=1, must="linear_cross_entropy makes the gradients that are asked for and no others.", since="1.1")
@pytest.mark.parametrize(("hidden", "weight"), [(False, False), (True, False), (False, True)])
def test_wanted_gradients(accelerator: Accelerator, measure: Measure, hidden: bool, weight: bool) -> None:
    case = make_case(20, 16, 60, seed=4)
    check_bounds(accelerator, measure, case, f"gradients {hidden}, {weight}", hidden=hidden, weight=weight)


@requires(level=1, must="Tokens that linear_cross_entropy ignores have no loss and no gradient.", since="1.1")
def test_ignored(accelerator: Accelerator) -> None:
    case = make_case(18, 12, 40, seed=5)
    case = replace(case, targets=case.targets.clone())
    case.targets[::2] = IGNORED
    nothing = replace(case, targets=torch.full_like(case.targets, IGNORED))
    empty = replace(case, hidden=case.hidden[:0], targets=case.targets[:0])
    with each_implementation(accelerator, NAME) as turns:
        for implementation, kernel in turns:
            found = run(accelerator, kernel, case)
            ignored = case.targets == IGNORED
            assert not found["losses"][ignored].any(), implementation
            assert not found["hidden_gradient"][ignored].any(), implementation
            assert found["losses"][~ignored].all(), implementation
            for other in (nothing, empty):
                found = run(accelerator, kernel, other)
                assert not any(one.any() for one in found.values()), f"{implementation}: nothing is not nothing"


@requires(level=1, must="A target outside the vocabulary makes its loss nan, and no other.", since="1.1")
@pytest.mark.parametrize("target", [-1, 40, 2**40])
def test_unknown_targets(accelerator: Accelerator, target: int) -> None:
    case = make_case(6, 12, 40, ignored=0.0, seed=6)
    losses = bound_cross_entropy(case)["losses"]
    case.targets[3] = target
    others = [0, 1, 2, 4, 5]
    with each_implementation(accelerator, NAME) as turns:
        for implementation, kernel in turns:
            found = run(accelerator, kernel, case)
            assert found["losses"].isnan().tolist() == [row == 3 for row in range(6)], implementation
            assert (shares_of(found["losses"], losses)[others] <= 1).all(), implementation
            assert found["hidden_gradient"].isnan().any(-1).tolist() == [row == 3 for row in range(6)], implementation
            assert found["weight_gradient"].isnan().any(), implementation


@requires(
    level=1, must="A token of inf or nan has a loss that is not finite, and spoils no other token's.", since="1.1"
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_not_finite(accelerator: Accelerator, value: float) -> None:
    case = make_case(6, 12, 40, ignored=0.0, seed=7)
    bounds = bound_cross_entropy(case)
    case.hidden[3, 5] = value
    others = [0, 1, 2, 4, 5]
    with each_implementation(accelerator, NAME) as turns:
        for implementation, kernel in turns:
            found = run(accelerator, kernel, case)
            for name in ("losses", "hidden_gradient"):
                assert not found[name][3].isfinite().any(), f"{implementation}: {value} is lost in {name}"
                assert (shares_of(found[name], bounds[name])[others] <= 1).all(), f"{implementation}: others are spoilt"
