"""Lanes on the streams of a device module: torch.cuda, torch.xpu, torch.<vendor>.

A device module says nowhere whether its device has streams, and some have stand-ins that order nothing, so
`has_streams` tries. Where there are none all lanes are one, which is synchronous but for collectives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from windlass.accelerator.interface import LANES, DoneWork, Event, Streams, Work

_NEEDED = ("Stream", "Event", "stream", "current_stream", "synchronize")


class DeviceEvent(Work):
    """A point of a stream. Waiting orders the stream that is current then; the host goes on at once."""

    def __init__(self, module: Any, stream: Any) -> None:
        self.stream = stream
        self._module = module
        self._event = module.Event()
        self._event.record(stream)

    def wait(self) -> None:
        current = self._module.current_stream()
        if current != self.stream:  # one stream is in order by itself
            current.wait_event(self._event)

    def done(self) -> bool:
        return bool(self._event.query())

    def block(self) -> None:
        """Block the host until the point is reached."""
        self._event.synchronize()


class DeviceLanes(Streams):
    """One stream per lane. "compute" is the stream that was current at opening, which is where users' models run."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._streams = {name: module.current_stream() if name == "compute" else module.Stream() for name in LANES}

    @property
    def current(self) -> Any:
        """The stream on which work is issued now."""
        return self._module.current_stream()

    @contextmanager
    def lane(self, name: str) -> Iterator[None]:
        if name not in self._streams:
            raise ValueError(f"there is no lane named {name!r}; the lanes are {', '.join(LANES)}")
        with self._module.stream(self._streams[name]):
            yield

    def record(self) -> DeviceEvent:
        return DeviceEvent(self._module, self.current)

    def synchronize(self) -> None:
        self._module.synchronize()


class OneLane(Streams):
    """All lanes in one, whose operations are over when they return. Collectives are not, until somebody waits."""

    def __init__(self) -> None:
        self._under_way: list[Work] = []

    def note(self, work: Work) -> Work:
        """Have `synchronize` wait for a work that is under way."""
        self._under_way = [one for one in self._under_way if not one.done()]
        self._under_way.append(work)
        return work

    def record(self) -> Event:
        return DoneWork()

    def synchronize(self) -> None:
        waiting, self._under_way = self._under_way, []
        for work in waiting:
            work.wait()


def open_lanes(module: Any) -> DeviceLanes | OneLane:
    """A stream per lane where the device has streams, else one lane for all. The device must be the current one."""
    return DeviceLanes(module) if has_streams(module) else OneLane()


def has_streams(module: Any) -> bool:
    """Whether streams of this module order anything: an event that a stream records can be asked and waited for.

    The stand-ins of torch.cpu, and of vendors that follow it, record None.
    """
    if any(getattr(module, name, None) is None for name in _NEEDED):
        return False
    event = module.Stream().record_event()
    return event is not None and all(hasattr(event, name) for name in ("query", "synchronize", "wait"))
