"""Lanes on the streams of a device module: torch.cuda, torch.xpu, torch.<vendor>.

A device module says nowhere whether its device has streams, and some have stand-ins that order nothing, so
`has_streams` tries. Where there are none all lanes are one, which is synchronous but for collectives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from windlass.accelerator.interface import LANES, DoneWork, Event, Streams, Work
from windlass.backends.generic.host_waits import HostWait

_NEEDED = ("Stream", "Event", "stream", "current_stream", "synchronize")
_URGENT: Final = ("gather", "reduce")
"""Lanes whose kernels go first: what they bring is waited for, and they leave most of the device to others."""
_HIGH_PRIORITY: Final = -1  # lower numbers go first in every module that has priorities


class DeviceEvent(Work):
    """A point of a stream. Waiting orders the stream that is current then; the host goes on at once."""

    def __init__(self, module: Any, stream: Any, host_wait: HostWait | None = None) -> None:
        self.stream = stream
        self._module = module
        self._host_wait = host_wait or HostWait()
        self._event = module.Event()  # without timing, which makes it cheap
        self._event.record(stream)

    def wait(self) -> None:
        current = self._module.current_stream()
        if current != self.stream:  # one stream is in order by itself
            current.wait_event(self._event)

    def done(self) -> bool:
        return bool(self._event.query())

    def block(self) -> None:
        """Block the host until the point is reached; raises what the lanes' watch finds meanwhile."""
        self._host_wait.block(self._event)


class Pending:
    """Works that the host carries out beside the lanes, such as collectives on its own memory."""

    def __init__(self) -> None:
        self._works: list[Work] = []

    def note(self, work: Work) -> Work:
        """Have `finish` wait for a work that is under way."""
        self._works = [one for one in self._works if not one.done()]
        self._works.append(work)
        return work

    def forget(self) -> None:
        """Wait for none of them any more: what carries them out is being closed."""
        self._works.clear()

    def finish(self) -> None:
        """Wait for all of them."""
        waiting, self._works = self._works, []
        for work in waiting:
            work.wait()


class DeviceLanes(Streams):
    """One stream per lane. "compute" is the stream that was current at opening, which is where users' models run."""

    def __init__(self, module: Any) -> None:
        self.pending = Pending()
        self.host_wait = HostWait()
        self._module = module
        self._streams = {name: self._open(name) for name in LANES}

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
        return DeviceEvent(self._module, self.current, self.host_wait)

    def synchronize(self) -> None:
        self.pending.finish()
        if self.host_wait.is_watched:  # the module's own wait cannot be left when a peer is lost
            for name in LANES:
                with self.lane(name):
                    self.record().block()
            self.record().block()
        self._module.synchronize()

    def _open(self, name: str) -> Any:
        if name == "compute":
            return self._module.current_stream()
        if name not in _URGENT:
            return self._module.Stream()
        try:
            return self._module.Stream(priority=_HIGH_PRIORITY)
        except TypeError:  # this module's streams have no priorities
            return self._module.Stream()


class OneLane(Streams):
    """All lanes in one, whose operations are over when they return. Collectives are not, until somebody waits."""

    def __init__(self) -> None:
        self.pending = Pending()

    def record(self) -> Event:
        return DoneWork()

    def synchronize(self) -> None:
        self.pending.finish()


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
