"""The CPU, opened: its four facets and what is known about it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.accelerator.environment import read_environment
from windlass.accelerator.interface import Accelerator, Capabilities
from windlass.accelerator.kernels import Kernels
from windlass.accelerator.reference import SCHEMAS, reference_kernels
from windlass.backends.cpu.collectives import CpuCollectives, TransportChoice
from windlass.backends.cpu.memory import FLOATS, CpuMemory
from windlass.backends.cpu.streams import CpuStreams


class CpuAccelerator(Accelerator):
    """The host's processor as an accelerator; each rank is one process on it."""

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def rng_state(self) -> Tensor:
        return torch.default_generator.get_state()

    def set_rng_state(self, state: Tensor) -> None:
        torch.default_generator.set_state(state)


def open_cpu(index: int = 0, *, transport: TransportChoice = "auto") -> CpuAccelerator:
    """Open the processor on this rank and meet the other ranks, which must all do the same.

    `transport` forces how ranks meet, for tests and comparisons. Raises ValueError for an index other than
    0, and what `process_group.join` raises when ranks do not come.
    """
    if index != 0:
        raise ValueError(f"the CPU is one device, 'cpu:0', got index {index}")
    from windlass.backends.cpu.kernels import cpu_kernels

    counters = Counters()
    collectives = CpuCollectives(counters, read_environment(), transport)
    try:
        kernels = Kernels(SCHEMAS, (*reference_kernels(), *cpu_kernels()), counters)
        on_pages = collectives.transport_name == "shared pages"
        flags = read_processor_flags()
        return CpuAccelerator(
            "cpu:0",
            torch.device("cpu"),
            CpuMemory(counters, collectives),
            CpuStreams(collectives.finish),
            collectives,
            kernels,
            Capabilities(
                dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in FLOATS),
                matmul_dtypes=find_matmul_dtypes(flags),
                views=True,
                one_sided=on_pages or collectives.world.size == 1,
                ordered_reduction=True,
                host_place=True,
                float64=True,
                shared_device=True,
            ),
            counters,
            _collect_facts(collectives),
        )
    except BaseException:
        collectives.close()
        raise


def find_matmul_dtypes(flags: frozenset[str]) -> tuple[str, ...]:
    """Dtypes in which a processor with these feature flags multiplies matrices at full speed."""
    dtypes = ["float32"]
    if flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        dtypes.append("bfloat16")
    if flags & {"amx_fp16", "avx512_fp16"}:
        dtypes.append("float16")
    return tuple(dtypes)


def read_processor_flags() -> frozenset[str]:
    """The feature flags of the first processor; none where the system does not tell."""
    for key in ("flags", "Features"):  # x86, ARM
        if value := _read_processor(key):
            return frozenset(value.split())
    return frozenset()


def _read_processor(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def _collect_facts(collectives: CpuCollectives) -> dict[str, Any]:
    return {
        "model": _read_processor("model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "ranks_on_host": collectives.host_ranks,
        "transport": collectives.transport_name,
    }
