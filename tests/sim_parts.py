"""The parts of a simulated device without its ranks: a conductor, memory and lanes, watched in this thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.backends.sim.conductor import Conductor, SimWork
from windlass.backends.sim.machines import Machine, load_machine
from windlass.backends.sim.memory import SimMemory
from windlass.backends.sim.settings import SimSettings
from windlass.backends.sim.streams import SimStreams
from windlass.backends.sim.watcher import unwatch, watch


def round_machine(**figures: Any) -> Machine:
    """A machine of round figures, all of them powers of two, so that times are exact."""
    return replace(
        load_machine("laptop"),
        device_memory_bytes=2**20,
        host_memory_bytes=2**21,
        disk_bytes=2**22,
        device_bandwidth_bytes_per_s=2.0**10,
        host_bandwidth_bytes_per_s=2.0**9,
        link_up_bytes_per_s=2.0**8,
        link_down_bytes_per_s=2.0**7,
        disk_read_bytes_per_s=2.0**6,
        disk_write_bytes_per_s=2.0**5,
        network_bytes_per_s=2.0**4,
        network_latency_s=0.5,
        launch_latency_s=0.25,
        matmul_flop_per_s={"float32": 2.0**6, "bfloat16": 2.0**8},
        **figures,
    )


@dataclass
class Parts:
    conductor: Conductor
    memory: SimMemory
    streams: SimStreams
    counters: Counters

    def collective(
        self,
        reads: Sequence[Tensor] = (),
        writes: Sequence[Tensor] = (),
        gate: threading.Event | None = None,  # not over before it is set
        what: str = "all_gather 'weights'",
        seconds: float = 0.0,
    ) -> SimWork:
        """Something of the current lane which copies its first input into its first output."""

        def act() -> None:
            if gate is not None:
                assert gate.wait(20)
            if reads and writes and writes[0] is not reads[0]:
                writes[0].copy_(reads[0])

        return self.conductor.issue(
            self.conductor.current_lane, act, reads=reads, writes=writes, what=what, seconds=seconds, in_order=True
        )


@contextmanager
def open_parts(machine: Machine | None = None, **settings: Any) -> Iterator[Parts]:
    """Opened, watched, and closed again."""
    chosen = SimSettings(**{"delay_ms": 0.1, **settings})
    counters = Counters()
    used = machine or load_machine(chosen.machine)
    conductor = Conductor(chosen, used)
    parts = Parts(conductor, SimMemory(chosen, used, counters, conductor), SimStreams(conductor), counters)
    watch(conductor)
    try:
        yield parts
    finally:
        unwatch(conductor)
        conductor.close()
