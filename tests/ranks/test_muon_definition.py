"""One matrix: `update_matrix` against the formula in double precision, and against torch.optim.Muon."""

from __future__ import annotations

import muon_definition_workers as workers
from windlass.conformance.rank_pool import run_ranks


def test_update_equals_the_formula_in_double_precision() -> None:
    """Three scales, all coefficients, both forms, with and without Nesterov, every kind of spectrum."""
    assert run_ranks(workers.compare_with_formula, 1) == [[]]


def test_update_equals_torch() -> None:
    """Where the definitions coincide: five steps of Jordan's coefficients with products in bf16."""
    assert run_ranks(workers.compare_with_torch, 1) == [[]]


def test_direction_does_not_depend_on_the_scale_of_the_gradient() -> None:
    assert run_ranks(workers.scale_gradients, 1) == [[]]


def test_zero_and_rank_one_gradients_are_finite() -> None:
    assert run_ranks(workers.degenerate_gradients, 1) == [[]]
