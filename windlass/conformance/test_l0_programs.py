"""Level 0: the programs that a lazy device compiles and runs, and that a device which is not lazy has none to count."""

from __future__ import annotations

import pytest
import torch

from windlass.accelerator.counters import ProgramCounts
from windlass.accelerator.errors import Unsupported
from windlass.accelerator.interface import Accelerator
from windlass.conformance.allocations import allocated, assert_holds, bring_number
from windlass.conformance.requirements import requires


def counts(accelerator: Accelerator) -> ProgramCounts:
    """What has been compiled and run, once all that was begun is over."""
    accelerator.capabilities.require("lazy", "operations run as they come, and there are no programs to count")
    accelerator.streams.synchronize()
    found = accelerator.program_counts()
    assert isinstance(found, ProgramCounts)
    return found


@requires(
    level=0,
    must="A lazy device counts the programs that it compiled and ran; what comes again is run and not compiled again.",
    needs="lazy",
)
def test_programs_are_counted(accelerator: Accelerator) -> None:
    with allocated(accelerator, torch.zeros(77)) as total, allocated(accelerator, torch.full((77,), 3.0)) as three:
        accelerator.streams.boundary()
        found = [counts(accelerator)]
        for _ in range(5):
            total.add_(three).add_(three * three)
            accelerator.streams.boundary()
            found.append(counts(accelerator))
        assert_holds(accelerator, total, torch.full((77,), 60.0))
    assert [one.executed - found[0].executed for one in found] == [0, 1, 2, 3, 4, 5]
    assert found[1].compiled > found[0].compiled, "a new program is compiled"
    assert {one.compiled for one in found[2:]} == {found[2].compiled}


@requires(
    level=0,
    must="On a lazy device a number that is data may change, and the program that uses it is not compiled again.",
    needs="lazy",
)
def test_data_is_no_part_of_a_program(accelerator: Accelerator) -> None:
    found = []
    with allocated(accelerator, torch.zeros(55)) as total:
        for number in (2.0, 3.0, 1.0, 0.0, -1.0):
            accelerator.streams.boundary()
            total.add_(bring_number(accelerator, number))
            accelerator.streams.boundary()
            found.append(counts(accelerator).compiled)
        assert_holds(accelerator, total, torch.full((55,), 5.0))
    assert found[1:] == [found[1]] * 4


@requires(
    level=0,
    must="Where operations run as they come there are no programs: asking for their counts raises Unsupported.",
    without="lazy",
)
def test_no_programs_to_count(accelerator: Accelerator) -> None:
    with pytest.raises(Unsupported, match="program"):
        accelerator.program_counts()
