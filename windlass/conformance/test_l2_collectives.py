"""Level 2: each collective on 1 to 4 ranks, against plain arithmetic on the host."""

from __future__ import annotations

import pytest

from windlass.accelerator.errors import Unsupported
from windlass.accelerator.interface import Accelerator
from windlass.conformance import collective_workers as workers
from windlass.conformance.collective_values import FLOATING, MOVED, dtype_needs, require_dtype
from windlass.conformance.plugin import Run
from windlass.conformance.requirements import requires

RANKS = pytest.mark.parametrize("ranks", [1, 2, 3, 4])
EVERY_DTYPE = pytest.mark.parametrize("dtype", MOVED)
FLOATING_DTYPE = pytest.mark.parametrize("dtype", FLOATING)
REDUCTIONS = pytest.mark.parametrize(
    ("source", "target"),
    [
        ("float32", "float32"),
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
    ],
)


@requires(
    level=2,
    must="An all-gather puts the inputs of all ranks into the output, in the order of the ranks, wherever both lie.",
    needs=lambda dtype, ranks: dtype_needs(dtype, f"ranks:{ranks}"),
)
@EVERY_DTYPE
@RANKS
def test_all_gather(accelerator: Accelerator, run: Run, dtype: str, ranks: int) -> None:
    require_dtype(accelerator, dtype)
    run(workers.gather, ranks, dtype)


@requires(
    level=2,
    must="The input of an all-gather may be this rank's own part of the output, where ranks may cut different parts.",
    needs=lambda dtype, ranks: dtype_needs(dtype, f"ranks:{ranks}"),
    without="uniform_program",
)
@FLOATING_DTYPE
@RANKS
def test_all_gather_in_place(accelerator: Accelerator, run: Run, dtype: str, ranks: int) -> None:
    require_dtype(accelerator, dtype)
    run(workers.gather_in_place, ranks, dtype)


@requires(
    level=2,
    must="A reduce-scatter gives each rank its part of all inputs, summed or the largest, in the dtype of the output.",
    needs=lambda source, target, ranks: dtype_needs(source, f"dtypes:{target}", f"ranks:{ranks}"),
)
@REDUCTIONS
@RANKS
def test_reduce_scatter(accelerator: Accelerator, run: Run, source: str, target: str, ranks: int) -> None:
    require_dtype(accelerator, source)
    require_dtype(accelerator, target)
    run(workers.reduce_scatter, ranks, source, target)


@requires(
    level=2,
    must="Infinities and NaN of one rank arrive in a sum over the ranks, so that an overflow is seen by all.",
    needs=lambda dtype, ranks: dtype_needs(dtype, f"ranks:{ranks}"),
)
@FLOATING_DTYPE
@pytest.mark.parametrize("ranks", [2, 4])
def test_sums_keep_special_values(accelerator: Accelerator, run: Run, dtype: str, ranks: int) -> None:
    require_dtype(accelerator, dtype)
    run(workers.reduce_special_values, ranks, dtype)


@requires(
    level=2,
    must="Where ordered_reduction is declared, sums into fp32 add in rank order, to the bit, however bucketed.",
    needs=lambda dtype, ranks: dtype_needs(dtype, "ordered_reduction", f"ranks:{ranks}"),
)
@FLOATING_DTYPE
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ordered_reduction(accelerator: Accelerator, run: Run, dtype: str, ranks: int) -> None:
    require_dtype(accelerator, dtype)
    for rank, wrong in enumerate(run(workers.reduce_in_order, ranks, dtype)):
        assert not wrong, f"rank {rank}"


@requires(
    level=2,
    must="Where ordered_reduction is not declared, requiring it raises Unsupported with the caller's advice.",
    without="ordered_reduction",
)
def test_undeclared_ordered_reduction(accelerator: Accelerator) -> None:
    with pytest.raises(Unsupported, match=r"ordered_reduction.*compare within a bound"):
        accelerator.capabilities.require("ordered_reduction", "compare within a bound instead")


@requires(
    level=2,
    must="An all-reduce leaves the same bits on every rank, reduced in the dtype of the vector.",
    needs=lambda dtype, ranks: dtype_needs(dtype, f"ranks:{ranks}"),
)
@FLOATING_DTYPE
@RANKS
def test_all_reduce(accelerator: Accelerator, run: Run, dtype: str, ranks: int) -> None:
    require_dtype(accelerator, dtype)
    first, *others = run(workers.all_reduce, ranks, dtype)
    for rank, bits in enumerate(others, 1):
        assert bits == first, f"rank {rank} has other bits than rank 0"


@requires(
    level=2,
    must="A broadcast copies the tensor of the source, whichever rank that is, into everybody's.",
    needs=lambda dtype, ranks: dtype_needs(dtype, f"ranks:{ranks}"),
)
@EVERY_DTYPE
@RANKS
def test_broadcast(accelerator: Accelerator, run: Run, dtype: str, ranks: int) -> None:
    require_dtype(accelerator, dtype)
    run(workers.broadcast, ranks, dtype)


@requires(
    level=2,
    must="An all-to-all delivers equal and empty parts, ordered by their senders, to the ranks they are for.",
    needs=lambda dtype, ranks: dtype_needs(dtype, f"ranks:{ranks}"),
)
@EVERY_DTYPE
@RANKS
def test_all_to_all(accelerator: Accelerator, run: Run, dtype: str, ranks: int) -> None:
    require_dtype(accelerator, dtype)
    run(workers.all_to_all, ranks, dtype, True)


@requires(
    level=2,
    must="Where ranks may run different programs, an all-to-all delivers uneven parts, other ones on each rank.",
    needs=lambda dtype, ranks: dtype_needs(dtype, f"ranks:{ranks}"),
    without="uniform_program",
)
@EVERY_DTYPE
@RANKS
def test_uneven_all_to_all(accelerator: Accelerator, run: Run, dtype: str, ranks: int) -> None:
    require_dtype(accelerator, dtype)
    run(workers.all_to_all, ranks, dtype, False)
