"""A stand-in for a device module with streams, over host tensors: it records what is issued where, and events happen
when a test says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any


class RecordedStream:
    def __init__(self, module: RecordedModule, name: str, priority: int) -> None:
        self._module = module
        self.name = name
        self.priority = priority

    def wait_event(self, event: RecordedEvent) -> None:
        self._module.log.append(f"{self.name} waits for {event.name}")

    def record_event(self) -> RecordedEvent:
        event = self._module.Event()
        event.record(self)
        return event


class RecordedEvent:
    def __init__(self, module: RecordedModule, name: str) -> None:
        self._module = module
        self.name = name
        self.happened = False
        self.happens_after: int | None = None  # so many questions; None: when a test says so

    def record(self, stream: RecordedStream) -> None:
        self._module.log.append(f"{self.name} on {stream.name}")

    def query(self) -> bool:
        if self.happens_after is not None:
            self.happened = self.happened or self.happens_after <= 0
            self.happens_after -= 1
        return self.happened

    def synchronize(self) -> None:
        self._module.log.append(f"host waits for {self.name}")
        self.happened = True

    def wait(self, stream: RecordedStream | None = None) -> None:
        (stream or self._module.current_stream()).wait_event(self)


class RecordedModule:
    """Streams are named s0 (the default), s1, ...; events e0, e1, ..."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.streams: list[RecordedStream] = []
        self.events: list[RecordedEvent] = []
        self._current = [self.Stream()]
        self.total, self.reserved = 2**30, 2**20

    def Stream(self, priority: int = 0) -> RecordedStream:
        self.streams.append(RecordedStream(self, f"s{len(self.streams)}", priority))
        return self.streams[-1]

    def Event(self) -> RecordedEvent:
        self.events.append(RecordedEvent(self, f"e{len(self.events)}"))
        return self.events[-1]

    @contextmanager
    def stream(self, stream: RecordedStream) -> Iterator[None]:
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def current_stream(self) -> RecordedStream:
        return self._current[-1]

    def synchronize(self) -> None:
        self.log.append("host waits for all")
        for event in self.events:
            event.happened = True

    def mem_get_info(self) -> tuple[int, int]:
        return self.total, self.total

    def memory_reserved(self) -> int:
        return self.reserved

    def forget(self) -> None:
        """Start recording anew."""
        self.log.clear()
        self.events.clear()


class RecordedRuntime:
    """CUDA's calls that lock host pages; refuses when told to."""

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}
        self.status = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if self.status == 0:
            self.locked[address] = nbytes
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return self.status


def with_runtime(runtime: RecordedRuntime) -> Any:
    """A device module that has nothing but that runtime."""
    return SimpleNamespace(cudart=lambda: runtime)
