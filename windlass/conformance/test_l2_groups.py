"""Level 2: groups of some ranks, barriers, fetches of published shards, and what the counters say."""

from __future__ import annotations

from pathlib import Path

import pytest

from windlass.accelerator.errors import Unsupported
from windlass.accelerator.interface import Accelerator
from windlass.conformance import group_workers as workers
from windlass.conformance.collective_values import FLOATING, dtype_needs, one_program, require_dtype, to_dtype
from windlass.conformance.collective_workers import equal_split_tables, split_tables
from windlass.conformance.plugin import Run
from windlass.conformance.requirements import requires

SEVERAL = pytest.mark.parametrize("ranks", [2, 3, 4])
RANKS = pytest.mark.parametrize("ranks", [1, 2, 3, 4])
FLOATING_DTYPE = pytest.mark.parametrize("dtype", FLOATING)


@requires(
    level=2,
    must="A group has the ranks that were asked for, in their order; asking again gives an equal group.",
    needs=lambda ranks: f"ranks:{ranks}",
)
@RANKS
def test_group_facts(run: Run, ranks: int) -> None:
    everyone = tuple(range(ranks))
    for rank, (world, backwards) in enumerate(run(workers.describe_groups, ranks)):
        assert world[1:4] == (everyone, rank, ranks)
        assert backwards == ("backwards", everyone[::-1], ranks - 1 - rank, ranks, True)


@requires(
    level=2,
    must="Where ranks may run different programs, every collective works on groups that share ranks with one another.",
    needs=lambda ranks: f"ranks:{ranks}",
    without="uniform_program",
)
@SEVERAL
def test_overlapping_groups(run: Run, ranks: int) -> None:
    run(workers.use_pairs, ranks)


@requires(
    level=2,
    must="Every collective works on groups of equal size that part the world, where every rank calls it on its own.",
    needs=lambda ranks: f"ranks:{ranks}",
)
@SEVERAL
def test_equal_parts_of_the_world(run: Run, ranks: int) -> None:
    run(workers.use_equal_parts_of_the_world, ranks)


@requires(
    level=2,
    must="Where ranks may run different programs, every collective works on any part of the world, in any order of "
    "ranks, and goes by the place in the group.",
    needs=lambda ranks: f"ranks:{ranks}",
    without="uniform_program",
)
@SEVERAL
def test_parts_of_the_world(run: Run, ranks: int) -> None:
    run(workers.use_parts_of_the_world, ranks)


@requires(
    level=2,
    must="Where ranks may run different programs, works on several groups may be under way together, and each rank "
    "waits for them in the order it likes.",
    needs=lambda ranks: f"ranks:{ranks}",
    without="uniform_program",
)
@SEVERAL
def test_groups_at_once(run: Run, ranks: int) -> None:
    run(workers.use_groups_at_once, ranks)


@requires(
    level=2,
    must="A barrier returns after every rank of the group has called it.",
    needs=lambda ranks: f"ranks:{ranks}",
)
@RANKS
def test_barrier(run: Run, ranks: int, tmp_path: Path) -> None:
    run(workers.meet_at_barriers, ranks, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2 * ranks


@requires(
    level=2,
    must="A fetch gathers the shards that were published last, counted as an all_gather.",
    needs=lambda dtype, ranks: dtype_needs(dtype, f"ranks:{ranks}"),
)
@FLOATING_DTYPE
@RANKS
def test_fetch(accelerator: Accelerator, run: Run, dtype: str, ranks: int) -> None:
    require_dtype(accelerator, dtype)
    run(workers.fetch, ranks, dtype)


@requires(
    level=2,
    must="Where one_sided is declared, a fetch is over although no other rank takes part.",
    needs=("one_sided", "ranks:3"),
)
def test_one_sided_fetch(run: Run, tmp_path: Path) -> None:
    assert run(workers.fetch_alone, 3, str(tmp_path))[0] == (True, True)


@requires(
    level=2,
    must="Where one_sided is not declared, a fetch is a meeting that is not over before all ranks have joined it.",
    needs="ranks:3",
    without="one_sided",
)
def test_fetch_is_a_meeting(run: Run, tmp_path: Path) -> None:
    declared, alone = run(workers.fetch_alone, 3, str(tmp_path))[0]
    assert alone == declared  # a backend may declare it for jobs of several ranks only


@requires(
    level=2,
    must="Where one_sided is not declared, requiring it raises Unsupported with the caller's advice.",
    without="one_sided",
)
def test_undeclared_one_sided(accelerator: Accelerator) -> None:
    with pytest.raises(Unsupported, match=r"one_sided.*let every rank fetch"):
        accelerator.capabilities.require("one_sided", "let every rank fetch")


@requires(
    level=2,
    must="The counters hold, by kind and tag, the calls of collectives and the bytes received from other ranks.",
    needs=lambda dtype, ranks: dtype_needs(dtype, f"ranks:{ranks}"),
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@RANKS
def test_counters(accelerator: Accelerator, run: Run, dtype: str, ranks: int) -> None:
    require_dtype(accelerator, dtype)
    others, nbytes = ranks - 1, 11 * to_dtype(dtype).itemsize
    uniform = one_program(accelerator)
    splits = equal_split_tables(ranks)["many elements each"] if uniform else split_tables(ranks)["uneven"]
    for rank, counted in enumerate(run(workers.count, ranks, dtype)):
        arriving = sum(row[rank] for sender, row in enumerate(splits) if sender != rank)
        wanted = {
            "all_gather 'weights'": (4, 4 * others * nbytes),
            "all_gather ''": (1, others * nbytes),
            "reduce_scatter 'gradients'": (1, others * nbytes),
            "all_reduce 'norm'": (1, others * nbytes),
            "broadcast 'start'": (1, 0 if rank == others else nbytes),
            "all_to_all 'tokens'": (1, arriving * to_dtype(dtype).itemsize),
        }
        if uniform or rank < 2:
            wanted["all_reduce 'in the pair'"] = (1, (ranks if uniform else min(ranks, 2)) * nbytes - nbytes)
        assert counted == wanted, f"rank {rank}"
