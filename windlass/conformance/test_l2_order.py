"""Level 2: collectives on several lanes keep the order that their works declare, and no other is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from windlass.conformance import stream_workers as workers
from windlass.conformance.plugin import Run
from windlass.conformance.requirements import requires

RANKS = pytest.mark.parametrize("ranks", [1, 2, 3, 4])
SEVERAL = pytest.mark.parametrize("ranks", [2, 3])


@requires(
    level=2,
    must="Fetches, reductions and updates on three lanes, ordered by events and works alone, train as on one lane.",
    needs=lambda ranks: f"ranks:{ranks}",
)
@RANKS
def test_lanes_of_a_training_step(run: Run, ranks: int) -> None:
    run(workers.train_a_little, ranks, 12)


@requires(
    level=2,
    must="Collectives may be waited for in any order, twice, and by other lanes than their own; another order on each "
    "rank harms nobody where ranks may run different programs.",
    needs=lambda ranks: f"ranks:{ranks}",
)
@RANKS
def test_collectives_waited_for_in_any_order(run: Run, ranks: int) -> None:
    run(workers.wait_in_any_order, ranks, 4)


@requires(
    level=2,
    must="The input of a collective may be rewritten after its wait(), even while other ranks are late.",
    needs=lambda ranks: f"ranks:{ranks}",
)
@SEVERAL
def test_inputs_rewritten_after_wait(run: Run, ranks: int) -> None:
    run(workers.rewrite_inputs, ranks, 20)


@requires(
    level=2,
    must="A copy after a collective copies what the collective wrote.",
    needs=lambda ranks: f"ranks:{ranks}",
)
@SEVERAL
def test_copy_after_a_collective(run: Run, ranks: int) -> None:
    run(workers.copy_after_collectives, ranks, 12)


@requires(
    level=2,
    must="Memory that is released after a collective stays readable to every rank until that is over.",
    needs=lambda ranks: f"ranks:{ranks}",
)
@SEVERAL
def test_release_after_a_collective(run: Run, ranks: int) -> None:
    run(workers.release_after_collectives, ranks, 12)


@requires(
    level=2,
    must="done() of a collective is False until all ranks have entered, then becomes True, and never blocks.",
    needs="ranks:2",
)
def test_done_of_a_collective(run: Run, tmp_path: Path) -> None:
    early, blocked = run(workers.ask_whether_done, 2, str(tmp_path))[0]
    assert not early, "done() was True before the other rank had entered"
    assert not blocked, "done() waited for the other rank"


@requires(
    level=2,
    must="When synchronize() returns, collectives that were issued before are over.",
    needs="ranks:2",
)
def test_synchronize_finishes_collectives(run: Run) -> None:
    run(workers.synchronize_collectives, 2, 6)
