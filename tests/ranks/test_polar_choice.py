"""All ranks orthogonalise in the form that is fastest on rank 0."""

from __future__ import annotations

from pathlib import Path

from polar_choice_workers import choose_forms
from windlass.conformance.rank_pool import run_ranks


def test_all_ranks_take_the_answer_of_rank_0(tmp_path: Path) -> None:
    forms = {"512 x 1024": "standard", "1024 x 512": "standard"}
    results = run_ranks(choose_forms, 2, str(tmp_path), ["polar_gram", "polar"])
    assert results == [(forms, True), (forms, False)]
