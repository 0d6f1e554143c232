"""The simulated accelerator, opened: its four facets and what is known about it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from windlass.accelerator.counters import Counters, ProgramCounts
from windlass.accelerator.environment import read_environment
from windlass.accelerator.errors import Unsupported
from windlass.accelerator.interface import Accelerator, Capabilities
from windlass.backends.sim.collectives import SimCollectives
from windlass.backends.sim.conductor import Conductor
from windlass.backends.sim.faults import Faults
from windlass.backends.sim.kernels import SimKernels
from windlass.backends.sim.machines import Machine, load_machine
from windlass.backends.sim.memory import SimMemory
from windlass.backends.sim.settings import SimSettings, parse_settings
from windlass.backends.sim.streams import SimStreams
from windlass.backends.sim.watcher import unwatch, watch


class SimAccelerator(Accelerator):
    """A device of the machine that WINDLASS_SIM names, on host memory; each rank is one process."""

    def __init__(self, name: str, conductor: Conductor, faults: Faults, **facets: Any) -> None:
        super().__init__(name, torch.device("cpu"), **facets)
        self._conductor = conductor
        self._faults = faults

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def rng_state(self) -> Tensor:
        return torch.default_generator.get_state()

    def set_rng_state(self, state: Tensor) -> None:
        torch.default_generator.set_state(state)

    def read_host(self, tensor: Tensor, *, tag: str = "step") -> list[float]:
        """As promised by the interface. `HostReadRefused` for one "step" more than the settings allow."""
        self.counters.host_reads += 1
        return self._conductor.read_host(tensor, tag)

    def to_host(self, tensor: Tensor) -> Tensor:
        program = self._conductor.program
        with nullcontext() if program is None else program.paused():
            return super().to_host(tensor)

    def program_counts(self) -> ProgramCounts:
        """How many different programs this rank has run, and how many in all. Raises Unsupported unless the device
        compiles: `uniform=true` in WINDLASS_SIM."""
        if self._conductor.program is None:
            raise Unsupported(f"{self.name} compiles no programs that could be counted; set WINDLASS_SIM=uniform=true")
        return self._conductor.program.counts

    def clock(self) -> float:
        """Simulated seconds once all issued work is over."""
        self.streams.synchronize()
        return self._conductor.clock.latest()

    def close(self) -> None:
        """Drop what was issued and not waited for, end the lanes and leave the groups. Safe to call twice."""
        unwatch(self._conductor)
        self._faults.close()
        self._conductor.close()
        self.collectives.close()


def open_sim(index: int = 0, settings: SimSettings | None = None) -> SimAccelerator:
    """Open a simulated device and meet the other ranks, which must all do the same; any number may open the same one.

    `settings` are those of WINDLASS_SIM unless given. Raises ValueError for settings that cannot be read, and what
    `process_group.join` raises when ranks do not come.
    """
    environment = read_environment()
    settings = settings or parse_settings(environment.simulation)
    machine = load_machine(settings.machine)
    name = f"sim:{index}"
    counters = Counters()
    faults = Faults(settings.fault, environment.rank, environment.timeout_seconds)
    conductor = Conductor(settings, machine, rank=environment.rank)
    try:
        collectives = SimCollectives(counters, environment, conductor, faults)
    except BaseException:
        conductor.close()
        raise
    accelerator = SimAccelerator(
        name,
        conductor,
        faults,
        memory=SimMemory(settings, machine, counters, conductor, name),
        streams=SimStreams(conductor),
        collectives=collectives,
        kernels=SimKernels(counters, conductor),
        capabilities=Capabilities(
            dtypes=("float32", "bfloat16", "float16"),
            matmul_dtypes=machine.matmul_dtypes,
            views=settings.views,
            asynchronous_lanes=True,
            ordered_reduction=True,
            uniform_program=settings.uniform,
            lazy=settings.uniform,
            host_place=True,
            disk_place=True,
            shared_device=True,
        ),
        counters=counters,
        facts=collect_facts(machine, settings),
    )
    watch(conductor)
    return accelerator


def collect_facts(machine: Machine, settings: SimSettings) -> dict[str, Any]:
    """What is simulated and how strictly, and the rates of the links. JSON-ready."""
    chosen = asdict(settings)
    del chosen["machine"]
    rates = {key: value for key, value in asdict(machine).items() if key.endswith("_bytes_per_s")}
    return {"model": machine.name, **chosen, **rates}
