"""Lanes of the generic base: one stream each where the device has streams, one synchronous lane where it has none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from recorded_device import RecordedEvent, RecordedModule
from windlass.accelerator.interface import LANES, Work
from windlass.backends.generic.streams import DeviceLanes, OneLane, has_streams, open_lanes


@pytest.fixture
def module() -> RecordedModule:
    return RecordedModule()


@pytest.fixture
def lanes(module: RecordedModule) -> DeviceLanes:
    opened = open_lanes(module)
    assert isinstance(opened, DeviceLanes)
    module.forget()
    return opened


def test_stand_ins_that_order_nothing_are_no_streams() -> None:
    assert not has_streams(torch.get_device_module("cpu"))
    assert not has_streams(SimpleNamespace(synchronize=lambda: None))
    assert isinstance(open_lanes(torch.get_device_module("cpu")), OneLane)


class Underway(Work):
    """Is over once it has been waited for."""

    over = False

    def wait(self) -> None:
        self.over = True

    def done(self) -> bool:
        return self.over


def test_one_lane_waits_for_collectives_when_it_is_synchronized() -> None:
    lane, first, second = OneLane(), Underway(), Underway()
    lane.pending.note(first)
    lane.pending.note(second)
    assert lane.record().done()
    assert [work.over for work in (first, second)] == [False, False]
    lane.synchronize()
    assert [work.over for work in (first, second)] == [True, True]


def test_every_lane_is_a_stream_and_compute_the_current_one(lanes: DeviceLanes, module: RecordedModule) -> None:
    seen = {}
    for name in LANES:
        with lanes.lane(name):
            seen[name] = lanes.current
    assert seen["compute"] is module.streams[0]
    assert len({id(stream) for stream in seen.values()}) == len(LANES)
    assert lanes.current is module.streams[0]
    with lanes.lane("gather"), lanes.lane("compute"):  # also from within another
        assert lanes.current is module.streams[0]


def test_lanes_that_others_wait_for_go_first(lanes: DeviceLanes, module: RecordedModule) -> None:
    priorities = {}
    for name in LANES:
        with lanes.lane(name):
            priorities[name] = lanes.current.priority
    assert priorities == {"compute": 0, "gather": -1, "reduce": -1, "up": 0, "down": 0}


def test_a_module_whose_streams_have_no_priorities(module: RecordedModule, monkeypatch: pytest.MonkeyPatch) -> None:
    with_priority = module.Stream
    monkeypatch.setattr(module, "Stream", lambda: with_priority())
    assert isinstance(open_lanes(module), DeviceLanes)


def test_an_unknown_lane(lanes: DeviceLanes) -> None:
    with (
        pytest.raises(ValueError, match=r"^there is no lane named 'side'; the lanes are compute, gather, "),
        lanes.lane("side"),
    ):
        pass


def test_a_lane_waits_for_an_event_and_the_host_does_not(lanes: DeviceLanes, module: RecordedModule) -> None:
    computed = lanes.record()
    with lanes.lane("gather"):
        lanes.wait(computed)
        gather = lanes.current.name
    assert module.log == ["e0 on s0", f"{gather} waits for e0"]
    assert computed.done() is False
    module.events[0].happened = True
    assert computed.done() is True


def test_a_stream_does_not_wait_for_itself(lanes: DeviceLanes, module: RecordedModule) -> None:
    lanes.record().wait()
    assert module.log == ["e0 on s0"]


def test_synchronize_waits_for_the_device(lanes: DeviceLanes, module: RecordedModule) -> None:
    event = lanes.record()
    lanes.synchronize()
    assert module.log == ["e0 on s0", "host waits for all"]
    assert event.done()


def test_synchronize_also_waits_for_what_the_host_carries_out(lanes: DeviceLanes) -> None:
    work = Underway()
    lanes.pending.note(work)
    lanes.synchronize()
    assert work.over


def test_synchronize_with_peers_asks_every_lane_before_it_waits_in_the_runtime(
    lanes: DeviceLanes, module: RecordedModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    lanes.host_wait.look_after(lambda: looks.append(len(module.events)))
    monkeypatch.setattr(RecordedEvent, "query", lambda event: True)
    lanes.synchronize()
    recorded = [line.partition(" on ")[2] for line in module.log[:-1]]
    assert set(recorded) == {stream.name for stream in module.streams[:1] + module.streams[-4:]}
    assert module.log[-1] == "host waits for all"
    assert len(looks) == len(recorded)
