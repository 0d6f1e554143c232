"""Mutations of the CPU's memory, of what it reads on the host, and of its random numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mutations import mutation
from windlass.accelerator.counters import Counters
from windlass.accelerator.interface import Measure, MemoryStats, Place, Work
from windlass.backends.cpu import device, memory
from windlass.backends.cpu.accounts import Account
from windlass.backends.cpu.device import CpuAccelerator
from windlass.backends.cpu.memory import CpuMemory

# ---- accounts


@mutation("cpu", CpuMemory, "stats", "`used` is always 0", "test_l0_statistics.py::test_used")
def used_always_zero(stats: Any, *args: Any) -> MemoryStats:
    found: MemoryStats = stats(*args)
    return replace(found, used=Measure("exact", 0))


@mutation("cpu", CpuMemory, "reset_peak", "the peak is never reset", "test_l0_statistics.py::test_reset_peak")
def peak_never_reset(reset_peak: Any, *args: Any) -> None:
    return None


@mutation("cpu", CpuMemory, "empty", "tags are forgotten", "test_l0_statistics.py::test_used_by_tag")
def tags_forgotten(empty: Any, *args: Any, tag: str = "", **options: Any) -> Any:
    return empty(*args, **options)


@mutation("cpu", Account, "add", "`used` is rounded up to a power of two", "test_l0_statistics.py::test_used")
def used_rounded_to_power_of_two(add: Any, self: Any, tag: str, nbytes: int, reserved: int) -> None:
    rounded = 1 << (abs(nbytes) - 1).bit_length() if nbytes else 0
    add(self, tag, rounded if nbytes > 0 else -rounded, reserved)


@mutation(
    "cpu", CpuMemory, "empty", "HOST is counted on the device's account", "test_l0_places.py::test_accounts_are_apart"
)
def host_counted_as_device(
    empty: Any, self: Any, shape: Any, dtype: Any, place: Place = Place.DEVICE, **options: Any
) -> Any:
    return empty(self, shape, dtype, Place.DEVICE, **options)


# ---- allocations


@mutation("cpu", CpuMemory, "release", "a tensor can be released twice", "test_l0_memory.py::test_release_twice")
def release_twice_accepted(release: Any, self: CpuMemory, tensor: Tensor, *, after: Work | None = None) -> None:
    if tensor.untyped_storage().data_ptr() in self._allocations:
        release(self, tensor, after=after)


@mutation("cpu", CpuMemory, "release", "a foreign tensor can be released", "test_l0_memory.py::test_release_foreign")
def release_of_foreign_accepted(release: Any, self: CpuMemory, tensor: Tensor, **options: Any) -> None:
    if tensor.untyped_storage().data_ptr() in self._allocations:
        release(self, tensor, **options)


@mutation("cpu", CpuMemory, "set_budget", "a budget is ignored", "test_l0_budget.py::test_budget_is_exact")
def budget_ignored(set_budget: Any, *args: Any) -> None:
    return None


@mutation("cpu", CpuMemory, "set_budget", "a budget is a byte too large", "test_l0_budget.py::test_budget_is_exact")
def budget_off_by_a_byte(set_budget: Any, self: Any, limit: int | None, *place: Place) -> None:
    set_budget(self, None if limit is None else limit + 1, *place)


@mutation("cpu", CpuMemory, "set_budget", "a budget is never taken away", "test_l0_budget.py::test_budget_is_lifted")
def budget_never_lifted(set_budget: Any, self: Any, limit: int | None, *place: Place) -> None:
    if limit is not None:
        set_budget(self, limit, *place)


@mutation("cpu", memory, "_reserve", "an allocation starts at 64 bytes", "test_l0_memory.py::test_alignment")
def allocation_not_aligned(reserve: Any, nbytes: int) -> tuple[Tensor, int]:
    buffer, reserved = reserve(nbytes + 64)
    return buffer[64:], reserved


@mutation(
    "cpu", CpuMemory, "empty", "an undeclared dtype is accepted", "test_l0_dtypes.py::test_undeclared_float_is_refused"
)
def undeclared_dtype_accepted(empty: Any, self: Any, shape: Any, dtype: Any, *args: Any, **options: Any) -> Any:
    if dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        return empty(self, shape, dtype, *args, **options)
    return empty(self, shape, torch.uint8, *args, **options).view(dtype)


# ---- copies


@mutation("cpu", CpuMemory, "copy", "a copy casts silently", "test_l0_copies.py::test_copy_does_not_cast")
def copy_casts(copy: Any, self: Any, destination: Tensor, source: Tensor, **options: Any) -> Any:
    return copy(self, destination, source.to(destination.dtype), **options)


@mutation("cpu", CpuMemory, "copy", "a copy broadcasts", "test_l0_copies.py::test_copy_does_not_reshape")
def copy_broadcasts(copy: Any, self: Any, destination: Tensor, source: Tensor, **options: Any) -> Any:
    try:
        source = source.expand(destination.shape)
    except RuntimeError as error:
        raise ValueError("shapes that do not broadcast") from error
    return copy(self, destination, source, **options)


@mutation(
    "cpu",
    CpuMemory,
    "copy",
    "a copy ignores where a slice begins",
    "test_l0_copies.py::test_copy_between_slices[0-5-3]",
)
def copy_ignores_offset(copy: Any, self: Any, destination: Tensor, source: Tensor, **options: Any) -> Any:
    return copy(self, destination, source.as_strided(source.shape, source.stride(), 0), **options)


@mutation("cpu", CpuMemory, "copy", "a copy is not counted", "test_l0_copies.py::test_copy_is_counted")
def copy_not_counted(copy: Any, self: CpuMemory, *args: Any, **options: Any) -> Any:
    kept, self._counters = self._counters, Counters()
    try:
        return copy(self, *args, **options)
    finally:
        self._counters = kept


@mutation(
    "cpu",
    CpuMemory,
    "_place_of",
    "copies between places count as copies within the device",
    "test_l0_places.py::test_copies_between_places_are_counted",
)
def copy_counted_as_another_kind(place_of: Any, *args: Any) -> Place:
    return Place.DEVICE


@mutation(
    "cpu",
    CpuMemory,
    "copy",
    "a copy does not wait for what it is told to",
    "test_l0_copy_order.py::test_copy_after_foreign_work",
)
def copy_ignores_after(
    copy: Any, self: Any, destination: Tensor, source: Tensor, *, after: Work | None = None, tag: str = ""
) -> Any:
    return copy(self, destination, source, tag=tag)


# ---- the device


@mutation(
    "cpu",
    CpuAccelerator,
    "set_rng_state",
    "set_rng_state does nothing",
    "test_l0_random.py::test_state_is_restored",
)
def rng_state_not_restored(set_rng_state: Any, *args: Any) -> None:
    return None


@mutation("cpu", CpuAccelerator, "seed", "the seed is ignored", "test_l0_random.py::test_seeds_differ")
def seed_ignored(seed: Any, self: Any, number: int) -> None:
    seed(self, 0)


@mutation("cpu", CpuAccelerator, "read_host", "a host read is not counted", "test_l0_reads.py::test_reads_are_counted")
def host_read_not_counted(read_host: Any, self: CpuAccelerator, tensor: Tensor, **options: Any) -> Any:
    values = read_host(self, tensor, **options)
    self.counters.host_reads -= 1
    return values


@mutation(
    "cpu",
    CpuAccelerator,
    "to_bytes",
    "to_bytes widens bfloat16 to float32",
    "test_l0_reads.py::test_bytes_of_floats",
)
def bytes_widened(to_bytes: Any, self: Any, tensor: Tensor) -> Any:
    return to_bytes(self, tensor.float() if tensor.is_floating_point() else tensor)


@mutation("cpu", CpuAccelerator, "to_host", "to_host returns the tensor itself", "test_l0_reads.py::test_to_host")
def to_host_aliases(to_host: Any, self: CpuAccelerator, tensor: Tensor) -> Tensor:
    to_host(self, tensor)
    return tensor.detach()


@mutation(
    "cpu",
    device,
    "Capabilities",
    "a place on the disk is declared, and there is none",
    "test_l0_places.py::test_there_and_back",
)
def disk_falsely_declared(capabilities: Any, **declared: Any) -> Any:
    return capabilities(**{**declared, "disk_place": True})
