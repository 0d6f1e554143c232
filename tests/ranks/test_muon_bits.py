"""Muon on ranks has the bits of each matrix updated alone in one process, whatever the stage and the layout."""

from __future__ import annotations

import functools

import pytest

from muon_oracle import Case
from muon_workers import Outcome, train_cases
from windlass.conformance.rank_pool import run_ranks

STAGES = [0, 1, 2, 3]
CASES = [
    *(Case(model, stage) for model in ("Fused", "Sundry", "Mixed") for stage in STAGES),
    *(Case("Fused", stage, accumulation=2, clip=1.0) for stage in STAGES),
    *(Case("Branching", stage) for stage in (1, 3)),
    Case("Sundry", 0, own=False, coefficients="polar_express", scale="original"),
    Case("Sundry", 3, accumulation=2, coefficients="ten", scale="spectral", nesterov=False),
    Case("Sundry", 1, precision="bf16", ns_dtype="bf16"),
    Case("Sundry", 3, precision="bf16", ns_dtype="bf16"),
    Case("Mixed", 2, precision="bf16"),
]


@functools.cache
def outcomes(ranks: int) -> list[dict[Case, Outcome]]:
    return run_ranks(train_cases, ranks, CASES)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_and_momentum_equal_the_reference(ranks: int, case: Case) -> None:
    found = [rank[case] for rank in outcomes(ranks)]
    (verdict,) = (one.verdict for one in found if one.verdict is not None)
    assert verdict.problems == []
    assert len({one.digest for one in found}) == 1
    everyone = case.stage == 0 and not case.own
    assert sum(one.orthogonalised for one in found) == verdict.updates * (ranks if everyone else 1)
    assert all(one.host_reads == 1 for one in found) or case.bound > 0  # late gradients take a second one
    assert all(one.by_tag == one.persistent for one in found)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("case", [case for case in CASES if case.model in ("Sundry", "Mixed")], ids=str)
def test_counters_confirm_the_plan(ranks: int, case: Case) -> None:
    """Where every parameter has a gradient."""
    for rank in outcomes(ranks):
        assert rank[case].measured == rank[case].predicted


def test_the_cases_travel() -> None:
    """In several waves, or there would be little to show."""
    assert outcomes(2)[0][Case("Sundry", 3)].waves >= 3
    assert outcomes(4)[0][Case("Fused", 3)].waves >= 3
