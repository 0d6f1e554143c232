"""The ledger of the simulated device says of every two accesses whether they are ordered, and forgets what it may."""

from __future__ import annotations

import random

import pytest

from windlass.backends.sim.errors import OrderViolation
from windlass.backends.sim.ledger import Ledger, Past, Touch, Tracked, WorkRecord

LANES = ("compute", "gather", "reduce")


class Program:
    """A ledger with one storage, driven by short sentences."""

    def __init__(self) -> None:
        self.ledger = Ledger(LANES)
        self.storage = Tracked("allocation 'weights'")

    def operate(self, lane: str, start: int, stop: int, *, write: bool, what: str = "operation") -> None:
        actor = self.ledger.actor(lane, self.ledger.tick(lane), what)
        self.ledger.enter(actor, [Touch(self.storage, start, stop, not write, write)])

    def issue(
        self, lane: str, start: int, stop: int, *, write: bool, after: tuple[Past, ...] = (), what: str = "work"
    ) -> WorkRecord:
        actor = self.ledger.work(lane, what, *after)
        self.ledger.enter(actor, [Touch(self.storage, start, stop, not write, write)])
        assert actor.work is not None
        return actor.work

    def wait(self, lane: str, work: WorkRecord) -> None:
        self.ledger.join(lane, self.ledger.after_work(work))


@pytest.fixture
def program() -> Program:
    return Program()


def test_operations_of_one_lane_are_ordered(program: Program) -> None:
    for _ in range(3):
        program.operate("compute", 0, 8, write=True)
        program.operate("compute", 0, 8, write=False)
    assert len(program.storage.accesses) == 2


def test_operations_of_two_lanes_are_ordered_by_an_event_after_the_first(program: Program) -> None:
    program.operate("compute", 0, 8, write=True)
    event = program.ledger.past("compute")
    program.ledger.join("gather", event)
    program.operate("gather", 0, 8, write=False)


def test_operations_of_two_lanes_without_an_event_race(program: Program) -> None:
    program.operate("compute", 0, 8, write=True, what="aten.add_")
    with pytest.raises(OrderViolation) as raised:
        program.operate("gather", 4, 12, write=False, what="aten.clone")
    assert str(raised.value) == (
        "aten.clone on lane gather reads bytes 4 to 8 of allocation 'weights', which aten.add_ on lane compute writes, "
        "and nothing orders the two; record an event on lane compute after it and wait for that on lane gather first"
    )


def test_an_event_does_not_cover_what_came_after_it(program: Program) -> None:
    event = program.ledger.past("compute")
    program.operate("compute", 0, 8, write=True)
    program.ledger.join("gather", event)
    with pytest.raises(OrderViolation, match="record an event on lane compute after it"):
        program.operate("gather", 0, 8, write=False)


def test_an_event_hands_on_all_that_its_lane_has_joined(program: Program) -> None:
    work = program.issue("reduce", 0, 8, write=True)
    program.wait("gather", work)
    program.ledger.join("compute", program.ledger.past("gather"))
    program.operate("compute", 0, 8, write=True)


def test_an_event_of_before_the_join_hands_on_nothing(program: Program) -> None:
    work = program.issue("reduce", 0, 8, write=True, what="reduce_scatter 'g'")
    event = program.ledger.past("gather")
    program.wait("gather", work)
    program.ledger.join("compute", event)
    with pytest.raises(OrderViolation, match=r"waited for on lane gather only: wait for it, .* on lane compute first"):
        program.operate("compute", 0, 8, write=False)


def test_a_work_races_until_it_is_waited_for(program: Program) -> None:
    work = program.issue("gather", 0, 8, write=True)
    program.operate("compute", 8, 16, write=True)  # other bytes
    with pytest.raises(OrderViolation, match=r"call wait\(\) of that work on lane compute first"):
        program.operate("compute", 0, 1, write=False)
    program.wait("compute", work)
    program.operate("compute", 0, 1, write=False)


def test_works_of_one_lane_are_not_ordered_by_being_there(program: Program) -> None:
    work = program.issue("gather", 0, 8, write=True)
    with pytest.raises(OrderViolation):
        program.issue("gather", 4, 12, write=True)
    program.wait("gather", work)
    program.issue("gather", 4, 12, write=True)


def test_after_orders_a_work_without_any_lane(program: Program) -> None:
    first = program.issue("gather", 0, 8, write=True)
    second = program.issue("reduce", 0, 8, write=False, after=(program.ledger.after_work(first),))
    with pytest.raises(OrderViolation):
        program.operate("compute", 0, 8, write=False)
    program.wait("compute", second)  # and so for the first
    program.operate("compute", 0, 8, write=True)


def test_reads_do_not_race(program: Program) -> None:
    program.issue("gather", 0, 8, write=False)
    program.issue("reduce", 0, 8, write=False)
    program.operate("compute", 0, 8, write=False)
    with pytest.raises(OrderViolation, match=r"writes bytes 0 to 8 .* which work on lane gather reads"):
        program.operate("compute", 0, 8, write=True)


def test_what_raises_enters_nothing(program: Program) -> None:
    other = Tracked("allocation 'other'")
    program.issue("gather", 0, 8, write=True)
    actor = program.ledger.actor("compute", program.ledger.tick("compute"), "operation")
    touches = [Touch(other, 0, 8, False, True), Touch(program.storage, 0, 8, True, False)]
    with pytest.raises(OrderViolation):
        program.ledger.enter(actor, touches)
    assert other.accesses == []


def test_what_is_gone_may_not_be_touched(program: Program) -> None:
    program.storage.gone = "was released before"
    with pytest.raises(OrderViolation, match="operation on lane compute uses allocation 'weights', which was released"):
        program.operate("compute", 0, 8, write=True)


def test_consumed_bytes_may_be_read_once_they_are_rewritten(program: Program) -> None:
    program.ledger.consume(program.storage, 0, 16, "kernel 'adamw'")
    program.operate("compute", 16, 24, write=False)
    with pytest.raises(OrderViolation, match=r"reads bytes 4 to 8 .* which kernel 'adamw' has consumed"):
        program.operate("compute", 4, 8, write=False)
    program.operate("compute", 4, 12, write=True)
    program.operate("compute", 4, 12, write=False)
    for start, stop in ((0, 5), (11, 13)):
        with pytest.raises(OrderViolation, match="consumed"):
            program.operate("compute", start, stop, write=False)
    program.operate("compute", 0, 4, write=True)
    program.operate("compute", 12, 16, write=True)
    program.operate("compute", 0, 16, write=False)
    assert program.storage.consumed == []


def test_a_strided_write_does_not_rewrite_consumed_bytes(program: Program) -> None:
    program.ledger.consume(program.storage, 0, 16, "kernel 'adamw'")
    actor = program.ledger.actor("compute", program.ledger.tick("compute"), "operation")
    program.ledger.enter(actor, [Touch(program.storage, 0, 16, read=False, write=True, dense=False)])
    with pytest.raises(OrderViolation, match="consumed"):
        program.operate("compute", 0, 16, write=False)


def test_after_join_all_nothing_races(program: Program) -> None:
    program.issue("gather", 0, 8, write=True)
    program.operate("reduce", 8, 16, write=True)
    program.ledger.join_all([program.storage])
    program.operate("compute", 0, 16, write=True)
    with pytest.raises(OrderViolation):  # what comes after it does again
        program.operate("gather", 0, 16, write=False)


def test_untracked_memory_is_remembered_by_its_last_accesses(program: Program) -> None:
    program.ledger.note(4096, "compute", program.ledger.tick("compute"), "aten.mul", True)
    program.ledger.join("gather", program.ledger.past("compute"))
    program.ledger.note(4096, "compute", program.ledger.tick("compute"), "aten.sum", False)
    program.storage.accesses = program.ledger.recall(4096, 64)
    program.issue("gather", 0, 8, write=False)  # after the write
    with pytest.raises(OrderViolation, match=r"which aten\.sum on lane compute reads"):
        program.issue("gather", 0, 8, write=True)


def test_thousands_of_steps_are_forgotten(program: Program) -> None:
    for step in range(3000):
        program.ledger.join("gather", program.ledger.past("compute"))
        work = program.issue("gather", 0, 64, write=False)
        program.wait("compute", work)
        program.operate("compute", step % 8 * 8, step % 8 * 8 + 8, write=True)
        assert len(program.storage.accesses) <= 20
    assert max(len(access.work.joined) for access in program.storage.accesses if access.work) == 1


def test_memory_that_is_only_read_is_forgotten_too(program: Program) -> None:
    program.operate("compute", 0, 64, write=True)
    for _ in range(3000):
        program.ledger.join("gather", program.ledger.past("compute"))
        program.wait("compute", program.issue("gather", 0, 64, write=False))
    assert len(program.storage.accesses) <= 3


def test_a_chain_of_works_does_not_grow(program: Program) -> None:
    past = program.ledger.past("compute")
    for step in range(2000):
        work = program.issue("gather", 0, 8, write=True, after=(past,))
        past = program.ledger.after_work(work)
        if step % 4 == 3:
            program.wait("compute", work)
            past = program.ledger.past("compute")
        assert len(past.works) <= 4


def test_ever_new_ranges_are_forgotten_once_every_lane_is_ordered_after_them(program: Program) -> None:
    for step in range(1500):
        program.operate("compute", 3 * step, 3 * step + 2, write=True)
        if step % 100 == 0:
            for lane in LANES[1:]:
                program.ledger.join(lane, program.ledger.past("compute"))
    assert len(program.storage.accesses) <= 512 + 200
    program.issue("compute", 0, 4500, write=False)


@pytest.mark.parametrize("piece", [0, 700, 1499])
def test_no_race_is_forgotten_among_many_pieces(program: Program, piece: int) -> None:
    for step in range(1500):
        program.operate("compute", 3 * step, 3 * step + 2, write=True)
    with pytest.raises(OrderViolation, match=rf"bytes {3 * piece} to {3 * piece + 2} "):
        program.issue("gather", 3 * piece, 3 * piece + 2, write=False)


def test_no_work_is_forgotten_among_many(program: Program) -> None:
    for step in range(1500):
        program.issue("reduce", 3 * step, 3 * step + 2, write=True)
    with pytest.raises(OrderViolation, match="bytes 0 to 2 "):
        program.operate("compute", 0, 2, write=False)


class Graph:
    """The oracle: every point of the program with its predecessors, every access, nothing ever forgotten."""

    def __init__(self) -> None:
        self.before: list[set[int]] = []
        self.accesses: list[tuple[int, int, int, bool]] = []
        self.at = {lane: self.add(set()) for lane in LANES}

    def add(self, direct: set[int]) -> int:
        closed = set(direct)
        for one in direct:
            closed |= self.before[one]
        self.before.append(closed)
        return len(self.before) - 1

    def races(self, point: int, start: int, stop: int, write: bool) -> bool:
        return any(
            begin < stop and start < end and (write or wrote) and other not in self.before[point]
            for other, begin, end, wrote in self.accesses
        )


@pytest.mark.parametrize("seed", range(40))
def test_it_finds_exactly_the_races_that_a_graph_of_everything_has(seed: int) -> None:
    draw = random.Random(seed)
    program, graph = Program(), Graph()
    works: list[tuple[WorkRecord, int]] = []
    events: list[tuple[Past, int]] = []
    found = 0
    for _ in range(250):
        lane = draw.choice(LANES)
        start = draw.randrange(24)
        stop = start + draw.randrange(1, 8)
        write = draw.random() < 0.3
        kind = draw.choice(("operation", "work", "work after", "join", "join", "record", "wait", "wait"))
        if kind == "operation":
            point = graph.at[lane] = graph.add({graph.at[lane]})
            race = graph.races(point, start, stop, write)
            if race:
                with pytest.raises(OrderViolation):
                    program.operate(lane, start, stop, write=write)
            else:
                program.operate(lane, start, stop, write=write)
                graph.accesses.append((point, start, stop, write))
        elif kind in ("work", "work after"):
            given = draw.sample(works, 1) if kind == "work after" and works else []
            after = tuple(program.ledger.after_work(record) for record, _ in given)
            point = graph.add({graph.at[lane], *(one for _, one in given)})
            race = graph.races(point, start, stop, write)
            if race:
                with pytest.raises(OrderViolation):
                    program.issue(lane, start, stop, write=write, after=after)
            else:
                works.append((program.issue(lane, start, stop, write=write, after=after), point))
                graph.accesses.append((point, start, stop, write))
        elif kind == "record":
            events.append((program.ledger.past(lane), graph.at[lane]))
            race = False
        else:
            race = False
            if kind == "join" and works:
                record, point = draw.choice(works[-6:])
                program.wait(lane, record)
            elif kind == "wait" and events:
                past, point = draw.choice(events[-6:])
                program.ledger.join(lane, past)
            else:
                continue
            graph.at[lane] = graph.add({graph.at[lane], point})
        found += race
    assert found
    assert len(graph.accesses) > 20
