"""Waiting for a device: in its runtime when nobody else counts, else by asking, with an eye on the peers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from recorded_device import RecordedEvent, RecordedModule
from windlass.accelerator.counters import Counters
from windlass.accelerator.errors import PeerLost
from windlass.accelerator.interface import Capabilities, Collectives
from windlass.accelerator.kernels import Kernels
from windlass.accelerator.reference import SCHEMAS, reference_kernels
from windlass.backends.generic.device import GenericAccelerator
from windlass.backends.generic.host_memory import HostAllocator
from windlass.backends.generic.host_waits import LOOK_SECONDS, SPIN_SECONDS, HostWait
from windlass.backends.generic.memory import DeviceMemory
from windlass.backends.generic.streams import DeviceLanes


class Clock:
    """Time passes when somebody sleeps, and a little when somebody looks."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def read(self) -> float:
        self.now += 1e-5
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def event() -> RecordedEvent:
    module = RecordedModule()
    module.Event()
    return module.events[0]


def test_without_peers_the_runtime_waits(event: RecordedEvent, clock: Clock) -> None:
    HostWait(clock=clock.read, sleep=clock.sleep).block(event)
    assert event.happened
    assert clock.now == 0


@pytest.mark.parametrize("read", ["to_host", "read_host"])
def test_what_lies_on_the_host_is_read_after_the_lane(read: str) -> None:
    module, counters = RecordedModule(), Counters()
    device = torch.device("meta")  # no tensor of the host lies there
    lanes = DeviceLanes(module)
    memory = DeviceMemory("gpu:0", device, module, lanes, counters, HostAllocator(), ("float32",))
    kernels = Kernels(SCHEMAS, reference_kernels(), counters)
    collectives = cast(Collectives, SimpleNamespace(close=lambda: None))
    accelerator = GenericAccelerator("gpu:0", device, memory, lanes, collectives, kernels, Capabilities(), counters)
    module.forget()
    getattr(accelerator, read)(torch.ones(2))
    assert module.log == ["e0 on s0", "host waits for e0"]


def test_what_is_nearly_over_is_not_slept_through(event: RecordedEvent, clock: Clock) -> None:
    looks: list[float] = []
    event.happens_after = 20
    HostWait(lambda: looks.append(clock.now), clock=clock.read, sleep=clock.sleep).block(event)
    assert event.happened
    assert clock.slept == []
    assert len(looks) == 1  # the last one


def test_what_takes_long_is_slept_through_and_looked_after(event: RecordedEvent, clock: Clock) -> None:
    looks: list[float] = []
    event.happens_after = 5000
    HostWait(lambda: looks.append(clock.now), clock=clock.read, sleep=clock.sleep).block(event)
    assert max(clock.slept) <= 0.0002
    assert clock.slept == sorted(clock.slept)
    assert clock.now > 0.5
    gaps = [later - earlier for earlier, later in zip([0.0, *looks], looks, strict=False)]
    assert all(LOOK_SECONDS <= gap < LOOK_SECONDS + 0.01 for gap in gaps[:-1])
    assert SPIN_SECONDS < LOOK_SECONDS


def test_what_the_watch_raises_ends_the_wait(event: RecordedEvent, clock: Clock) -> None:
    def watch() -> None:
        raise PeerLost("rank 1 died")

    wait = HostWait(clock=clock.read, sleep=clock.sleep)
    wait.look_after(watch)
    with pytest.raises(PeerLost, match="rank 1 died"):
        wait.block(event)
    assert not event.happened
    assert LOOK_SECONDS <= clock.now < 2 * LOOK_SECONDS


def test_an_event_that_happened_because_a_collective_was_broken_off_is_found_out(
    event: RecordedEvent, clock: Clock
) -> None:
    def watch() -> None:
        raise PeerLost("the library reports REMOTE_ERROR")

    event.happened = True
    with pytest.raises(PeerLost, match="REMOTE_ERROR"):
        HostWait(watch, clock=clock.read, sleep=clock.sleep).block(event)
