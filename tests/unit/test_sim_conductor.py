"""Works of the simulated device are late, shuffled, in the order that was declared, and fail aloud."""

from __future__ import annotations

import functools
import threading
import time
from typing import Any

import pytest
import torch

from sim_parts import Parts, open_parts, round_machine
from windlass.accelerator.errors import CollectiveTimeout, WindlassError
from windlass.accelerator.interface import Place
from windlass.backends.sim.clock import Clock
from windlass.backends.sim.conductor import SimWork
from windlass.backends.sim.errors import HostReadRefused, OrderViolation


def shuffle(seed: int, in_order: bool = False, **settings: Any) -> list[int]:
    """The order in which sixteen works of one lane begin that could all begin at once."""
    begun: list[int] = []
    gate = threading.Event()
    with open_parts(seed=seed, delay_ms=2.0, **settings) as parts, parts.streams.lane("up"):
        held = parts.collective(gate=gate)
        works = []
        for index in range(16):
            action = functools.partial(begun.append, index)
            works.append(
                parts.conductor.issue(
                    "up", action, reads=(), writes=(), what=f"copy {index}", seconds=0, in_order=in_order, after=held
                )
            )
        gate.set()
        for work in works:
            work.finish()
    return begun


def test_copies_overtake_in_an_order_drawn_from_the_seed() -> None:
    orders = {seed: shuffle(seed) for seed in (1, 2, 3)}
    assert all(sorted(order) == list(range(16)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()} | {tuple(range(16))}) == 4
    assert shuffle(1) == orders[1]


def test_collectives_of_a_lane_keep_their_order() -> None:
    assert shuffle(1, in_order=True) == list(range(16))


def test_works_are_late_and_on_the_thread_of_their_lane() -> None:
    names: list[str] = []
    with open_parts(delay_ms=20.0, seed=3) as parts:
        begun = time.monotonic()
        works = [
            parts.conductor.issue(
                lane, lambda: names.append(threading.current_thread().name), reads=(), writes=(), what="copy",
                seconds=0.0, in_order=False,
            )
            for lane in ("up", "down", "up", "down")
        ]  # fmt: skip
        assert not all(work.done() for work in works)
        parts.streams.synchronize()
        assert time.monotonic() - begun > 0.005
        assert all(work.done() for work in works)
    assert sorted(names) == ["sim rank 0 lane down"] * 2 + ["sim rank 0 lane up"] * 2


def test_wait_on_the_compute_lane_blocks_the_host_and_elsewhere_does_not() -> None:
    gate = threading.Event()
    with open_parts() as parts:
        with parts.streams.lane("gather"):
            work = parts.collective(gate=gate)
        with parts.streams.lane("reduce"):
            work.wait()
            event = parts.streams.record()
        assert not work.done()
        assert not event.done()
        threading.Timer(0.05, gate.set).start()
        event.wait()
        assert work.done()
        assert event.done()


def test_a_work_begins_after_what_its_lane_had_waited_for() -> None:
    """Also where the dependency lies behind it in the queue of its own lane: nothing waits in a circle."""
    begun: list[str] = []
    gate = threading.Event()
    with open_parts() as parts, parts.streams.lane("gather"):
        conductor = parts.conductor

        def issue(name: str, **more: Any) -> SimWork:
            return conductor.issue(
                conductor.current_lane, lambda: begun.append(name), reads=(), writes=(), what=name, seconds=0.0, **more
            )

        with parts.streams.lane("reduce"):
            held = parts.collective(gate=gate)
        copy = issue("copy", in_order=False, after=held)
        copy.wait()
        first = issue("first", in_order=True)
        event = parts.streams.record()
        with parts.streams.lane("reduce"):
            parts.streams.wait(event)
            last = issue("last", in_order=True)
        free = issue("free", in_order=False, after=None)
        time.sleep(0.02)
        assert begun == []
        gate.set()
        for work in (copy, first, last, free):
            work.finish()
    assert begun.index("copy") < min(begun.index(name) for name in ("first", "last", "free"))


def test_outputs_are_poisoned_when_a_work_begins_unless_they_are_inputs() -> None:
    with open_parts() as parts:
        output, input = torch.zeros(4), torch.ones(4)
        work = parts.conductor.issue(
            "compute", lambda: None, reads=[input], writes=[output, input], what="nothing", seconds=0.0, in_order=True
        )
        work.wait()
        assert output.isnan().all()
        assert input.eq(1).all()


def test_an_operation_in_a_lane_waits_for_what_the_lane_waits_for() -> None:
    gate = threading.Event()
    with open_parts() as parts:
        source, target = torch.arange(4.0), torch.zeros(4)
        event = parts.streams.record()
        with parts.streams.lane("gather"):
            parts.streams.wait(event)
            work = parts.collective([source], [target], gate)
            work.wait()
            threading.Timer(0.05, gate.set).start()
            assert target.sum() == 6


# -- failures ----------------------------------------------------------------------------------------------------


def fail(parts: Parts, lane: str, error: BaseException) -> SimWork:
    def act() -> None:
        raise error

    return parts.conductor.issue(lane, act, reads=(), writes=(), what="all_gather 'w'", seconds=0.0, in_order=True)


def test_a_failure_is_raised_where_it_is_waited_for_with_its_cause() -> None:
    cause = CollectiveTimeout("rank 3 did not come to all_gather 'w'")
    with open_parts() as parts:
        work = fail(parts, "gather", cause)
        with pytest.raises(CollectiveTimeout, match="all_gather 'w' on lane gather failed: rank 3 did") as raised:
            work.wait()
        assert raised.value.__cause__ is cause
        parts.streams.synchronize()  # told once
        parts.streams.boundary()


@pytest.mark.parametrize("where", ["synchronize", "boundary"])
def test_a_failure_that_nobody_waited_for_is_raised_once(where: str) -> None:
    cause = RuntimeError("simulated failure")
    with open_parts() as parts:
        work = fail(parts, "reduce", cause)
        while not work.done():
            time.sleep(0.001)
        with pytest.raises(WindlassError, match="failed: RuntimeError: simulated failure") as raised:
            getattr(parts.streams, where)()
        assert raised.value.__cause__ is cause
        getattr(parts.streams, where)()


def test_nothing_is_carried_out_after_a_failure_on_its_lane_or_behind_it() -> None:
    begun: list[str] = []
    cause = CollectiveTimeout("rank 3 did not come")
    gate = threading.Event()
    with open_parts() as parts:
        conductor = parts.conductor
        with parts.streams.lane("gather"):
            parts.collective(gate=gate)
        failed = fail(parts, "gather", cause)
        following = conductor.issue(
            "gather", lambda: begun.append("same lane"), reads=(), writes=(), what="next", seconds=0, in_order=True
        )
        dependent = conductor.issue(
            "up", lambda: begun.append("behind"), reads=(), writes=(), what="copy", seconds=0, in_order=False,
            after=failed,
        )  # fmt: skip
        gate.set()
        told = r"copy on lane up was not carried out, because all_gather 'w' on lane gather failed before: rank 3"
        with pytest.raises(CollectiveTimeout, match=told):
            dependent.wait()
        with pytest.raises(CollectiveTimeout, match="next on lane gather was not carried out"):
            following.wait()
        with pytest.raises(CollectiveTimeout, match="all_gather 'w' on lane gather failed") as raised:
            conductor.issue("gather", lambda: None, reads=(), writes=(), what="later", seconds=0, in_order=True)
        assert raised.value.__cause__ is cause
        parts.streams.synchronize()
    assert begun == []


def test_a_race_raises_where_it_is_issued_and_leaves_the_device_working() -> None:
    gate = threading.Event()
    with open_parts() as parts:
        output = torch.zeros(4)
        first = parts.collective(writes=[output], gate=gate)
        with pytest.raises(OrderViolation, match="a tensor of shape"):
            parts.collective(writes=[output[2:]])
        gate.set()
        first.wait()
        parts.collective(writes=[output[2:]]).wait()


def test_close_ends_the_threads_within_a_second_and_fails_what_is_open() -> None:
    gate = threading.Event()
    with open_parts() as parts:
        stuck = parts.collective(gate=gate)
        open_work = parts.collective()
        begun = time.monotonic()
        parts.conductor.close()
        assert time.monotonic() - begun < 1
        for work in (stuck, open_work):
            with pytest.raises(WindlassError, match="the device was closed before it was over"):
                work.wait()
        with pytest.raises(ValueError, match="the device is closed"):
            parts.collective()
        parts.conductor.close()
    threads = [one for one in threading.enumerate() if one.name.startswith("sim rank")]
    assert all(one.daemon for one in threads)
    gate.set()
    for thread in threads:
        thread.join(1)
        assert not thread.is_alive()


def test_close_lets_works_that_are_about_to_end_end() -> None:
    with open_parts(delay_ms=5.0) as parts:
        work = parts.collective()
        parts.conductor.close()
        assert work.done()
        work.wait()


# -- host reads --------------------------------------------------------------------------------------------------


def test_a_step_reads_the_host_once() -> None:
    with open_parts() as parts:
        values = torch.tensor([1.5, 2.0])
        for _ in range(2):
            assert parts.conductor.read_host(values, "step") == [1.5, 2.0]
            assert parts.conductor.read_host(values, "evaluation") == [1.5, 2.0]
            with pytest.raises(HostReadRefused, match="called 2 times between two boundaries, where 1 may be"):
                parts.conductor.read_host(values, "step")
            parts.streams.boundary()


def test_the_host_does_not_read_what_is_under_way() -> None:
    gate = threading.Event()
    with open_parts() as parts:
        values = torch.zeros(2)
        work = parts.collective(writes=[values], gate=gate)
        with pytest.raises(OrderViolation, match="read_host on lane compute reads"):
            parts.conductor.read_host(values, "test")
        gate.set()
        work.wait()
        parts.conductor.read_host(values, "test")


# -- the simulated clock -----------------------------------------------------------------------------------------


def test_costs_are_those_of_the_machine() -> None:
    clock = Clock(round_machine())
    assert clock.operation_seconds(2048) == 2 + 0.25
    assert clock.operation_seconds(2048, 512, "float32") == 8 + 0.25
    assert clock.operation_seconds(2048, 512, "bfloat16") == 2 + 0.25
    assert clock.operation_seconds(0, 512, "float16") == 8 + 0.25  # no figure of its own: the slowest
    assert clock.network_seconds(64) == 4 + 0.5
    device, host, disk = Place.DEVICE, Place.HOST, Place.DISK
    costs = {
        (host, device): 4, (device, host): 8, (device, device): 2, (host, host): 4, (disk, host): 16, (host, disk): 32,
        (disk, device): 16, (device, disk): 32, (disk, disk): 48,
    }  # fmt: skip
    assert {pair: clock.copy_seconds(*pair, 1024) for pair in costs} == costs


def test_what_is_not_waited_for_overlaps() -> None:
    with open_parts(round_machine()) as parts:
        clock, streams = parts.conductor.clock, parts.streams
        parts.conductor.operation("kernel", seconds=2.0)
        event = streams.record()
        with streams.lane("gather"):
            streams.wait(event)
            first = parts.collective(seconds=3.0)  # 2 to 5
            second = parts.collective(seconds=4.0)  # 5 to 9: one after the other
        with streams.lane("up"):
            third = parts.collective(seconds=1.0)  # 0 to 1: nothing was waited for
        parts.conductor.operation("kernel", seconds=1.5)
        assert clock.now("compute") == 3.5
        first.wait()
        assert clock.now("compute") == 5.0
        third.wait()
        assert clock.now("compute") == 5.0
        fourth = parts.conductor.issue(
            "down", lambda: None, reads=(), writes=(), what="copy", seconds=0.5, in_order=False, after=second
        )
        assert clock.latest() == 9.5
        fourth.wait()
        assert clock.now("compute") == 9.5
        streams.synchronize()
        assert {clock.now(lane) for lane in ("compute", "gather", "reduce", "up", "down")} == {9.5}


@pytest.mark.parametrize(("both", "end"), [(2.0**7, 32.0), (2.0**9, 16.0)])
def test_copies_both_ways_share_the_link(both: float, end: float) -> None:
    with open_parts(round_machine(link_both_bytes_per_s=both)) as parts:
        device = [parts.memory.empty((512,), torch.float32) for _ in range(2)]
        host = [parts.memory.empty((512,), torch.float32, Place.HOST) for _ in range(2)]
        with parts.streams.lane("up"):
            parts.memory.copy(device[0], host[0])  # 8 seconds alone, and the other 16
        with parts.streams.lane("down"):
            parts.memory.copy(host[1], device[1])
        assert parts.conductor.clock.latest() == end
        with parts.streams.lane("gather"):
            parts.collective(seconds=1.0)  # takes no part in it
        assert parts.conductor.clock.latest() == end


def test_torch_operations_cost_bytes_or_products() -> None:
    with open_parts(round_machine()) as parts:
        clock = parts.conductor.clock
        one, two = torch.ones(8, 8), torch.ones(8, 8)
        start = clock.now("compute")
        total = one + two
        assert clock.now("compute") - start == 3 * 256 / 2**10 + 0.25
        start = clock.now("compute")
        assert (one @ total).shape == (8, 8)
        assert clock.now("compute") - start == 2 * 8**3 / 2**6 + 0.25
        start = clock.now("compute")
        assert total.view(64)[3:].shape == (61,)  # views cost nothing
        assert clock.now("compute") == start


def test_pace_really_takes_its_time() -> None:
    with open_parts(pace=0.05, delay_ms=0.0) as parts:
        begun = time.monotonic()
        parts.collective(seconds=1.0).wait()
        assert time.monotonic() - begun >= 0.05
