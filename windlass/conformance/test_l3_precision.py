"""Level 3: training in the dtypes that a backend declares, and steps that are skipped because of a bad gradient."""

from __future__ import annotations

import pytest

from windlass.accelerator.interface import Accelerator
from windlass.conformance import precision_workers
from windlass.conformance.cells import STAGES, Run
from windlass.conformance.requirements import requires

LONG = {"bf16": "bfloat16", "fp16": "float16"}
REFUSED = "train in float32 instead"  # here, and not on ranks that would have to be started again


@pytest.mark.parametrize("precision", LONG)
@pytest.mark.parametrize("stage", STAGES)
@requires(
    level=3,
    must="Training with weights of a low precision follows plain PyTorch with fp32 master weights, and publishes the "
    "masters rounded.",
    needs=lambda precision: (f"dtypes:{LONG[precision]}", "ranks:2"),
)
def test_low_precision_follows_master_weights(accelerator: Accelerator, run: Run, stage: int, precision: str) -> None:
    accelerator.capabilities.require(f"dtypes:{LONG[precision]}", REFUSED)
    run(precision_workers.low_precision_against_oracle, 2, stage, precision)


@pytest.mark.parametrize("precision", LONG)
@requires(
    level=3,
    must="Training in a dtype that is not declared raises Unsupported, which names the dtype.",
    without=lambda precision: f"dtypes:{LONG[precision]}",
)
def test_undeclared_precision_is_refused(run: Run, precision: str) -> None:
    run(precision_workers.refuse_undeclared_precision, 1, precision)


@pytest.mark.parametrize("stage", STAGES)
@requires(
    level=3,
    must="A module of several dtypes trains with a master for each low-precision weight, and its integer buffers stay.",
    needs=("dtypes:bfloat16", "ranks:2"),
)
def test_mixed_dtypes(accelerator: Accelerator, run: Run, stage: int) -> None:
    accelerator.capabilities.require("dtypes:bfloat16", REFUSED)
    run(precision_workers.mixed_dtypes_in_one_module, 2, stage)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@requires(
    level=3,
    must="A gradient that overflows on one rank skips the step on all, changes nothing, and halves the loss scale.",
    needs=lambda ranks: ("dtypes:float16", f"ranks:{ranks}"),
)
def test_overflow_on_one_rank_skips_everywhere(accelerator: Accelerator, run: Run, ranks: int, stage: int) -> None:
    accelerator.capabilities.require("dtypes:float16", REFUSED)
    run(precision_workers.overflow_on_one_rank, ranks, stage)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@requires(
    level=3,
    must="A gradient in float32 that is not a number on one rank skips the step on all and changes nothing.",
    needs=lambda ranks: f"ranks:{ranks}",
)
def test_nonfinite_gradient_skips_everywhere(run: Run, ranks: int, stage: int) -> None:
    run(precision_workers.nonfinite_in_fp32, ranks, stage)
