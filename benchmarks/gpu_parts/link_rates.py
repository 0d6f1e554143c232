"""The floors themselves: copies on the device, the link to host memory, and matrix products."""

from __future__ import annotations

from collections.abc import Iterator

from gpu_parts.context import Context
from gpu_parts.rows import Row
from windlass.accelerator.interface import Place
from windlass.rates import DIRECTIONS, measure_copy, measure_link, measure_matmul

PART = "rates"
_MIB = 2**20


def measure_copies(context: Context) -> Iterator[Row]:
    """Bytes read and written per second, on the device and in host memory."""
    places = [Place.DEVICE, *[Place.HOST] * context.accelerator.capabilities.host_place]
    for place in places:
        full = (16 * _MIB, 256 * _MIB, 2048 * _MIB) if place is Place.DEVICE else (16 * _MIB, 256 * _MIB)
        for size in full if context.scale == "full" else (_MIB // 4,):
            rate = measure_copy(context.accelerator, size, place)
            yield Row(PART, f"copy, {place.value}", f"{size / _MIB:g} MiB", "windlass", True, value=rate, unit="B/s")


def measure_links(context: Context) -> Iterator[Row]:
    """Bytes per second between the device and page-locked host memory, one way and both ways at once."""
    if not context.accelerator.capabilities.host_place:
        yield Row(PART, "link", "", "windlass", error="the device has no host memory of its own to copy from")
        return
    for direction in DIRECTIONS:
        for size in (_MIB, 16 * _MIB, 256 * _MIB) if context.scale == "full" else (_MIB // 4,):
            rate = measure_link(context.accelerator, direction, size)
            case = f"{size / _MIB:g} MiB" + (" each" if direction == "both" else "")
            yield Row(PART, f"link, {direction}", case, "windlass", True, value=rate, unit="B/s")


def measure_matmuls(context: Context) -> Iterator[Row]:
    """Operations per second of square products of random numbers, in each dtype that the device declares."""
    for dtype in context.accelerator.capabilities.matmul_dtypes:
        for rows in (1024, 2048, 4096, 8192, 16384) if context.scale == "full" else (64,):
            rate = measure_matmul(context.accelerator, dtype, rows)
            yield Row(PART, f"matmul, {dtype}", f"{rows} x {rows}", "torch", value=rate, unit="FLOP/s")


ITEMS = (("copies", measure_copies), ("links", measure_links), ("matrix products", measure_matmuls))
