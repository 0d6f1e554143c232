"""Level 3 on lazy devices: a step is one program, compiled once, read when somebody asks. And ranks of one program."""

from __future__ import annotations

import pytest

from windlass.accelerator.interface import Accelerator
from windlass.conformance import program_workers as workers
from windlass.conformance.cells import STAGES, Run
from windlass.conformance.requirements import requires

STEPS = 8
WARM = 2  # steps after which nothing new may come

EVERY_STAGE = pytest.mark.parametrize("stage", STAGES)


def require_lazy(accelerator: Accelerator) -> None:
    accelerator.capabilities.require("lazy", "operations run as they come, and there are no programs to count")


@EVERY_STAGE
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scheduled", [False, True], ids=["by hand", "by a scheduler"])
@requires(
    level=3,
    must="On a lazy device no program is compiled after the second step, though the learning rate changes and a step "
    "is skipped.",
    needs=lambda ranks: ("lazy", f"ranks:{ranks}"),
)
def test_nothing_is_compiled_after_two_steps(
    accelerator: Accelerator, run: Run, ranks: int, stage: int, scheduled: bool
) -> None:
    require_lazy(accelerator)
    for counts in run(workers.programs_compiled, ranks, stage, STEPS, scheduled):
        assert counts[WARM:] == [counts[WARM - 1]] * (STEPS - WARM)


@EVERY_STAGE
@pytest.mark.parametrize("accumulation", [1, 2])
@requires(
    level=3,
    must="On a lazy device an optimizer step on one rank runs one program if nobody reads what came of it.",
    needs=("lazy", "ranks:1"),
)
def test_a_step_is_one_program(accelerator: Accelerator, run: Run, stage: int, accumulation: int) -> None:
    require_lazy(accelerator)
    (executed,) = run(workers.programs_run, 1, stage, accumulation, STEPS)
    assert executed[WARM:] == [1] * (STEPS - WARM)


@EVERY_STAGE
@pytest.mark.parametrize("ranks", [1, 2])
@requires(
    level=3,
    must="On a lazy device a step takes no host read if nobody asks for what came of it, and one if somebody does.",
    needs=lambda ranks: ("lazy", f"ranks:{ranks}"),
)
def test_a_step_is_read_when_asked_for(accelerator: Accelerator, run: Run, ranks: int, stage: int) -> None:
    require_lazy(accelerator)
    assert run(workers.host_reads, ranks, stage, 4, False) == [[0] * 4] * ranks
    assert run(workers.host_reads, ranks, stage, 4, True) == [[1] * 4] * ranks


@EVERY_STAGE
@requires(
    level=3,
    must="Where every rank must run the same program, ranks that use different parts of a model are told so, all of "
    "them, with RuntimeError.",
    needs=("uniform_program", "ranks:2"),
)
def test_different_programs_are_refused(
    accelerator: Accelerator, run: Run, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WINDLASS_TIMEOUT", "30")  # seconds, for a rank whose peer has gone
    accelerator.capabilities.require("uniform_program", "ranks may run programs of their own, nothing is refused")
    run(workers.run_different_programs, 2, stage)
