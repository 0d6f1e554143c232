"""Mutations of the simulated accelerator: of what it promises, which the suite sees, and of how strict it is, which
only its own tests can see."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mutations import mutation
from windlass.accelerator.interface import DoneWork, Event, Place, Work
from windlass.backends.cpu import gloo
from windlass.backends.sim import conductor, lanes, watcher
from windlass.backends.sim.clock import Clock
from windlass.backends.sim.conductor import COMPUTE, Conductor, SimWork
from windlass.backends.sim.device import SimAccelerator
from windlass.backends.sim.lanes import LaneThreads
from windlass.backends.sim.ledger import Ledger, Touch
from windlass.backends.sim.memory import SimMemory
from windlass.backends.sim.streams import SimStreams
from windlass.backends.sim.watcher import Watcher
from windlass.backends.sim.works import SimEvent

_MEMORY = "tests/unit/test_sim_memory.py"
_CONDUCTOR = "tests/unit/test_sim_conductor.py"

# ---- promises: lanes


@mutation(
    "sim",
    SimStreams,
    "wait",
    "waiting for an event orders nothing",
    "test_l2_streams.py::test_event_orders_another_lane",
)
def waiting_for_event_dropped(wait: Any, *args: Any) -> None:
    return None


@mutation(
    "sim",
    SimStreams,
    "record",
    "a recorded point is over at once",
    "test_l2_streams.py::test_event_orders_another_lane",
)
def record_of_nothing(record: Any, *args: Any) -> Event:
    return DoneWork()


@mutation(
    "sim",
    SimWork,
    "wait",
    "wait() orders nothing off the compute lane",
    "test_l2_streams.py::test_event_carries_works",
)
def wait_ignored_off_compute_lane(wait: Any, self: SimWork) -> None:
    if self._conductor.current_lane == COMPUTE:
        wait(self)


@mutation(
    "sim",
    SimWork,
    "done",
    "done() is True before the work is over",
    "test_l2_order.py::test_done_of_a_collective",
)
def done_too_early(done: Any, self: SimWork) -> bool:
    return True


@mutation("sim", LaneThreads, "drain", "synchronize() does not wait", "test_l2_streams.py::test_synchronize")
def synchronize_does_not_wait(drain: Any, *args: Any) -> None:
    return None


@mutation(
    "sim",
    LaneThreads,
    "enqueue",
    "a work runs before what it depends on",
    "test_l0_copy_order.py::test_chain_of_copies",
)
def dependencies_ignored(enqueue: Any, self: LaneThreads, work: SimWork) -> None:
    work.depends = frozenset()
    enqueue(self, work)


@mutation(
    "sim",
    SimMemory,
    "copy",
    "copies do not overlap, although asynchronous_lanes is declared",
    "test_l2_streams.py::test_overlap",
)
def copies_are_synchronous(copy: Any, *args: Any, **options: Any) -> Any:
    work = copy(*args, **options)
    work.finish()
    return work


@mutation(
    "sim",
    Conductor,
    "record",
    "an event is over before the works that its lane has waited for",
    "test_l2_streams.py::test_event_carries_works",
)
def event_forgets_works(record: Any, self: Conductor) -> SimEvent:
    event: SimEvent = record(self)
    event.works = frozenset()
    return event


@mutation(
    "sim",
    Conductor,
    "boundary",
    "host reads are counted from the first step on",
    "test_l0_reads.py::test_one_read_in_each_step",
)
def host_reads_never_forgotten(boundary: Any, self: Conductor) -> None:
    reads = self._host_reads
    boundary(self)
    self._host_reads = reads


# ---- promises: memory, random numbers, sums


@mutation(
    "sim",
    SimMemory,
    "release",
    "release forgets what it is to wait for",
    "test_l2_copies.py::test_release_after_a_copy",
)
def release_ignores_after(release: Any, self: Any, tensor: Tensor, *, after: Work | None = None) -> None:
    release(self, tensor)


@mutation("sim", SimMemory, "set_budget", "the host has no budget", "test_l0_places.py::test_budgets_are_apart[host]")
def host_budget_ignored(set_budget: Any, self: Any, limit: int | None, place: Place = Place.DEVICE) -> None:
    if place is not Place.HOST:
        set_budget(self, limit, place)


@mutation(
    "sim", SimMemory, "empty", "the disk is counted as host memory", "test_l0_places.py::test_accounts_are_apart[disk]"
)
def disk_counted_as_host(
    empty: Any, self: Any, shape: Any, dtype: Any, place: Place = Place.DEVICE, **options: Any
) -> Any:
    return empty(self, shape, dtype, Place.HOST if place is Place.DISK else place, **options)


@mutation(
    "sim",
    SimAccelerator,
    "set_rng_state",
    "set_rng_state does nothing",
    "test_l0_random.py::test_state_is_restored",
)
def simulated_rng_state_not_restored(set_rng_state: Any, *args: Any) -> None:
    return None


@mutation(
    "sim",
    gloo,
    "reduce_in_order",
    "the order in which sums add depends on the rank",
    "test_l2_collectives.py::test_ordered_reduction[3-float32]",
)
def sums_shuffled(reduce: Any, output: Tensor, terms: Any, op: str) -> None:
    reduce(output, [*terms[1:], terms[0]], op)


# ---- strictness: what nobody promises, and everybody has to be told


@mutation(
    "sim",
    conductor,
    "poison",
    "memory that is gone keeps its bytes",
    f"{_MEMORY}::test_released_memory_is_poisoned_and_may_not_be_used",
)
def gone_memory_not_poisoned(poison: Any, tensor: Tensor) -> None:
    return None


@mutation(
    "sim",
    Ledger,
    "consume",
    "what a kernel has consumed can be read",
    "tests/unit/test_sim_kernels.py::test_consumed_tensor_may_not_be_read_until_it_is_rewritten",
)
def consumed_memory_readable(consume: Any, *args: Any) -> None:
    return None


@mutation(
    "sim",
    lanes,
    "poison",
    "an output holds old values until its work is over",
    f"{_CONDUCTOR}::test_outputs_are_poisoned_when_a_work_begins_unless_they_are_inputs",
)
def output_not_poisoned(poison: Any, tensor: Tensor) -> None:
    return None


@mutation(
    "sim",
    SimMemory,
    "_move_all",
    "slices that are kept over a boundary stay alive",
    f"{_MEMORY}::test_at_a_boundary_an_allocation_moves_and_its_slices_stay_behind",
)
def nothing_moves_at_boundaries(move_all: Any, *args: Any) -> None:
    return None


@mutation(
    "sim",
    Conductor,
    "read_host",
    "a step may read the host as often as it likes",
    f"{_CONDUCTOR}::test_a_step_reads_the_host_once",
)
def host_reads_not_limited(read_host: Any, self: Any, tensor: Tensor, tag: str) -> Any:
    return read_host(self, tensor, "no step")


@mutation(
    "sim",
    watcher,
    "_require_may_read",
    "the core may read the device past read_host",
    "tests/unit/test_sim_watcher.py::test_the_core_does_not_read_the_host",
)
def raw_host_reads_allowed(require_may_read: Any, *args: Any) -> None:
    return None


@mutation(
    "sim",
    Watcher,
    "_enter",
    "torch operations are not held against what is under way",
    f"{_MEMORY}::test_a_copy_is_not_there_before_it_is_waited_for",
)
def operations_not_watched(enter: Any, *args: Any) -> None:
    return None


@mutation(
    "sim",
    Ledger,
    "_record",
    "reads are forgotten, so that a write after them is no race",
    "tests/unit/test_sim_ledger.py::test_reads_do_not_race",
)
def reads_forgotten(record: Any, self: Ledger, actor: Any, touch: Touch) -> None:
    if touch.write:
        record(self, actor, touch)


@mutation(
    "sim",
    Conductor,
    "issue",
    "copies never overtake each other",
    f"{_CONDUCTOR}::test_copies_overtake_in_an_order_drawn_from_the_seed",
)
def copies_keep_their_order(issue: Any, *args: Any, in_order: bool, **options: Any) -> Any:
    return issue(*args, in_order=True, **options)


@mutation(
    "sim",
    Clock,
    "latest",
    "the simulated clock stands still",
    f"{_CONDUCTOR}::test_what_is_not_waited_for_overlaps",
)
def clock_stands_still(latest: Any, self: Clock) -> float:
    return 0.0
