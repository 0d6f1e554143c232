"""Level 1: rms_norm, layer_norm and what goes back through them, each result within its bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.conformance.allocations import assert_holds, assert_same_bits, bring, dtype_named
from windlass.conformance.kernel_runs import each_implementation
from windlass.conformance.norm_cases import (
    NormCase,
    bound_backward,
    bound_forward,
    make_case,
    shares_of,
    statistics_of,
)
from windlass.conformance.plugin import Measure
from windlass.conformance.requirements import requires

NORMS = pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
SHAPES = [(1, 1), (37, 96), (5, 7)]
MIXED = [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32")]


def name_of(case: NormCase) -> str:
    return "layer_norm" if case.centred else "rms_norm"


def run_forward(accelerator: Accelerator, kernel: Any, case: NormCase) -> dict[str, Tensor]:
    """The results on the host; what went in must be as it was."""
    host = {"input": case.input, "weight": case.weight, "bias": case.bias}
    given = {name: None if one is None else bring(accelerator, one) for name, one in host.items()}
    if case.centred:
        results = kernel(given["input"], given["weight"], given["bias"], eps=case.eps)
    else:
        results = kernel(given["input"], given["weight"], eps=case.eps)
    _assert_kept(accelerator, given, host, name_of(case))
    names = ("output", "mean", "rstd") if case.centred else ("output", "rstd")
    found = {name: accelerator.to_host(one) for name, one in zip(names, results, strict=True)}
    assert (found["output"].shape, found["output"].dtype) == (case.input.shape, case.input.dtype)
    for name in names[1:]:
        assert (found[name].shape, found[name].dtype) == (case.input.shape[:1], torch.float32)
    return found


def run_backward(
    accelerator: Accelerator, kernel: Any, case: NormCase, mean: Tensor, rstd: Tensor
) -> dict[str, Tensor]:
    """The gradients on the host; what went in must be as it was."""
    host = {
        "output_gradient": case.output_gradient, "input": case.input, "weight": case.weight,
        "mean": mean if case.centred else None, "rstd": rstd,
    }  # fmt: skip
    given = {name: None if one is None else bring(accelerator, one) for name, one in host.items()}
    arguments = [one for name, one in given.items() if name != "mean" or case.centred]
    results = kernel(*arguments, **({"bias": case.bias is not None} if case.centred else {}))
    _assert_kept(accelerator, given, host, f"{name_of(case)}_backward")
    names = ("input_gradient", "weight_gradient", "bias_gradient")[: len(results)]
    found = {name: accelerator.to_host(one) for name, one in zip(names, results, strict=True) if one is not None}
    shaped = {"input_gradient": case.input, "weight_gradient": case.weight, "bias_gradient": case.bias}
    like = {name: one for name, one in shaped.items() if one is not None}
    assert set(found) == set(like)
    for name, one in found.items():
        assert (one.shape, one.dtype) == (like[name].shape, like[name].dtype), name
    return found


def _assert_kept(
    accelerator: Accelerator, given: dict[str, Tensor | None], host: dict[str, Tensor | None], kernel: str
) -> None:
    for name, one in given.items():
        before = host[name]
        if one is not None and before is not None:
            assert_holds(accelerator, one, before, f"{name}, which {kernel} does not consume,")


def check_bounds(accelerator: Accelerator, measure: Measure, case: NormCase, what: str) -> None:
    """Forward and backward of every implementation against the tolerance of the schema; the worst is noted."""
    mean, rstd = statistics_of(case)
    bounds_of = {name_of(case): bound_forward(case), f"{name_of(case)}_backward": bound_backward(case, mean, rstd)}
    for name, bounds in bounds_of.items():
        with each_implementation(accelerator, name) as turns:
            for implementation, kernel in turns:
                if name == name_of(case):
                    found = run_forward(accelerator, kernel, case)
                else:
                    found = run_backward(accelerator, kernel, case, mean, rstd)
                shares = {key: float(shares_of(found[key], bound).max(initial=0)) for key, bound in bounds.items()}
                measure(
                    "kernel", name=name, implementation=implementation, case=what, error=max(shares.values()),
                    bound=1.0, unit="of the allowed error",
                )  # fmt: skip
                assert max(shares.values()) <= 1, f"{implementation}, {what}: shares of what is allowed are {shares}"


@requires(
    level=1,
    must="rms_norm and layer_norm and their gradients are within their bounds, rounded once to their dtypes.",
    needs=lambda dtypes: tuple(f"dtypes:{name}" for name in sorted(set(dtypes))),
    since="1.1",
)
@NORMS
@pytest.mark.parametrize("dtypes", MIXED, ids=" and ".join)
def test_bounds(accelerator: Accelerator, measure: Measure, centred: bool, dtypes: tuple[str, str]) -> None:
    for tokens, size in SHAPES:
        case = make_case(
            tokens, size, centred=centred, dtype=dtype_named(dtypes[0]), weight=dtype_named(dtypes[1]), seed=size
        )
        check_bounds(accelerator, measure, case, f"{tokens} x {size} of {dtypes[0]}, weight of {dtypes[1]}")


@requires(level=1, must="The norms do without weight and bias, and layer_norm with one of them.", since="1.1")
@NORMS
def test_absent_vectors(accelerator: Accelerator, measure: Measure, centred: bool) -> None:
    kinds = [(None, False), (torch.float32, False), (None, True)] if centred else [(None, False)]
    for weight, bias in kinds:
        case = make_case(9, 40, centred=centred, weight=weight, bias=bias, seed=3)
        check_bounds(accelerator, measure, case, f"weight {weight is not None}, bias {bias}")


@requires(level=1, must="The norms of long rows and of many rows are within their bounds.", since="1.1")
@NORMS
def test_larger_shapes(accelerator: Accelerator, measure: Measure, centred: bool) -> None:
    for tokens, size in ((2, 9001), (700, 16)):
        check_bounds(
            accelerator, measure, make_case(tokens, size, centred=centred, seed=4), f"larger: {tokens} x {size}"
        )


@requires(level=1, must="Where rows are small eps decides, and rows of one value are as good as others.", since="1.1")
@NORMS
def test_small_rows(accelerator: Accelerator, measure: Measure, centred: bool) -> None:
    for eps in (1e-5, 0.5):
        for scale in (0.0, 1e-4):
            case = make_case(6, 24, centred=centred, eps=eps, scale=scale, seed=5)
            check_bounds(accelerator, measure, case, f"eps {eps:g}, rows times {scale:g}")
    same = make_case(6, 24, centred=centred, seed=6)
    same.input.copy_(torch.arange(6.0)[:, None].expand(6, 24))
    check_bounds(accelerator, measure, same, "rows of one value")


@requires(level=1, must="The norms of no rows are empty, and their gradients of weight and bias are zero.", since="1.1")
@NORMS
def test_no_rows(accelerator: Accelerator, centred: bool) -> None:
    case = make_case(0, 8, centred=centred)
    mean, rstd = statistics_of(case)
    with each_implementation(accelerator, name_of(case)) as turns:
        for _, kernel in turns:
            assert run_forward(accelerator, kernel, case)["output"].numel() == 0
    with each_implementation(accelerator, f"{name_of(case)}_backward") as turns:
        for implementation, kernel in turns:
            found = run_backward(accelerator, kernel, case, mean, rstd)
            for name in set(found) - {"input_gradient"}:
                assert_same_bits(found[name], torch.zeros(8), f"{name} of {implementation}")


@requires(level=1, must="A row with inf or nan spoils no other row of a norm, forward or backward.", since="1.1")
@NORMS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_not_finite(accelerator: Accelerator, centred: bool, value: float) -> None:
    case = make_case(6, 20, centred=centred, seed=7)
    mean, rstd = statistics_of(case)
    healthy = [0, 1, 3, 4, 5]
    clean = bound_forward(case)["output"], bound_backward(case, mean, rstd)["input_gradient"]
    case.input[2, 11] = value
    mean, rstd = statistics_of(case)
    with each_implementation(accelerator, name_of(case)) as turns:
        for implementation, kernel in turns:
            output = run_forward(accelerator, kernel, case)["output"]
            assert (shares_of(output, clean[0])[healthy] <= 1).all(), f"{implementation}: other rows are spoilt"
            assert not output[2].isfinite().all(), f"{implementation}: {value} is lost"
    with each_implementation(accelerator, f"{name_of(case)}_backward") as turns:
        for implementation, kernel in turns:
            found = run_backward(accelerator, kernel, case, mean, rstd)
            back = found["input_gradient"]
            assert (shares_of(back, clean[1])[healthy] <= 1).all(), f"{implementation}: other rows are spoilt"
            assert not back[2].isfinite().all(), f"{implementation}: {value} is lost"
            assert not found["weight_gradient"][11].isfinite(), f"{implementation}: {value} is lost"
