"""Level 3: models that strain a backend train like plain PyTorch, at every stage."""

from __future__ import annotations

import pytest

from windlass.conformance.cells import STAGES, STEPS, Run, trained_cell
from windlass.conformance.requirements import requires
from windlass.conformance.training import assert_equals_oracle

ACCUMULATION = 2
MODELS = [
    "Tied", "Checkpointed", "CheckpointedReentrant", "UnusedEverywhere", "CalledOften", "Frozen", "TinyPieces",
    "OneParameter", "ReadsAnother", "InPlaceFirst",
]  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", MODELS)
@requires(
    level=3,
    must="A model with tied, unused, frozen, tiny or often used parameters, or with activation checkpointing, trains "
    "like plain PyTorch.",
    needs="ranks:2",
)
def test_model_trains_like_plain_pytorch(run: Run, model: str, stage: int) -> None:
    (result, _) = trained_cell(run, 2, stage, ACCUMULATION, model, of=(ACCUMULATION,))
    norms = assert_equals_oracle(result["state"], model, STEPS)
    assert result["norms"] == pytest.approx(norms, rel=1e-5)
    assert result["left"] == 0


@pytest.mark.parametrize("stage", STAGES)
@requires(
    level=3,
    must="Where ranks may run different programs, ranks that use different parts of a model train like plain PyTorch.",
    needs=lambda stage: ("ranks:2", "one_sided") if stage == 3 else "ranks:2",
    without="uniform_program",
)
def test_ranks_may_use_different_parts(run: Run, stage: int) -> None:
    (result, _) = trained_cell(run, 2, stage, ACCUMULATION, "Branching", of=(ACCUMULATION,))
    norms = assert_equals_oracle(result["state"], "Branching", STEPS, ranks=2, accumulation=ACCUMULATION)
    assert result["norms"] == pytest.approx(norms, rel=1e-5)
