"""How fast a device is: copies on it, to it and from it, and matrix products, measured through the interface alone.

These are the floors of everything else: a kernel that moves bytes is judged by the rate of a copy, one that multiplies
matrices by the rate of a product, and what goes to host memory and back by the rate of the link.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator, Place

Direction = Literal["up", "down", "both"]
DIRECTIONS: Final[tuple[Direction, ...]] = ("up", "down", "both")

SHORTEST_SECONDS: Final = 2e-3
"""What one measurement takes at least. A device that grows hot is slower over a longer time: compare what was measured
over equal ones."""

_MIB: Final = 2**20
_TAG: Final = "rates"
_PATTERN: Final = 512  # rows and columns of random numbers that a large matrix repeats


@dataclass(frozen=True)
class Rates:
    """What was measured of one device; a dict goes from the size of the measurement to the rate."""

    accelerator: str  # "cuda:0"
    device_copy: dict[int, float]  # bytes of the source -> bytes read and written per second
    host_copy: dict[int, float]  # the same in host memory; empty without a host place, as the next three are
    up: dict[int, float]  # bytes of a copy from host memory to the device -> bytes per second
    down: dict[int, float]  # from the device to host memory
    both: dict[int, float]  # of each of two copies, one each way -> bytes per second of both together
    matmul: dict[str, dict[int, float]]  # dtype -> rows of square matrices -> floating-point operations per second

    @property
    def best_copy(self) -> float:
        """The floor of what moves bytes on the device, in bytes read and written per second."""
        return max(self.device_copy.values())

    def best_matmul(self, dtype: str) -> float:
        """The floor of what multiplies matrices of `dtype`, in operations per second; ValueError if not measured."""
        if not self.matmul.get(dtype):
            raise ValueError(
                f"no matrix product in {dtype} was measured on {self.accelerator}, only in "
                f"{', '.join(self.matmul) or 'none'}; name it when measuring"
            )
        return max(self.matmul[dtype].values())

    def to_json(self) -> dict[str, Any]:
        """Plain data; sizes become strings when it is written."""
        return asdict(self)


def measure_rates(
    accelerator: Accelerator,
    *,
    copy_bytes: Sequence[int] = (16 * _MIB, 256 * _MIB),
    link_bytes: Sequence[int] = (_MIB, 16 * _MIB, 256 * _MIB),
    matmul_rows: Sequence[int] = (1024, 4096, 8192),
    matmul_dtypes: Sequence[str] | None = None,  # default: those that the device declares
) -> Rates:
    """Measure all of it, in a few seconds on a fast device. Memory: four times the largest copy, three matrices."""
    linked = accelerator.capabilities.host_place
    dtypes = accelerator.capabilities.matmul_dtypes if matmul_dtypes is None else tuple(matmul_dtypes)
    links = {
        direction: {size: measure_link(accelerator, direction, size) for size in link_bytes if linked}
        for direction in DIRECTIONS
    }
    return Rates(
        accelerator.name,
        device_copy={size: measure_copy(accelerator, size) for size in copy_bytes},
        host_copy={size: measure_copy(accelerator, size, Place.HOST) for size in copy_bytes if linked},
        **links,
        matmul={dtype: {rows: measure_matmul(accelerator, dtype, rows) for rows in matmul_rows} for dtype in dtypes},
    )


def measure_copy(
    accelerator: Accelerator, nbytes: int, place: Place = Place.DEVICE, *, shortest: float = SHORTEST_SECONDS
) -> float:
    """Bytes read and written per second by a copy of `nbytes` within one place."""
    with _buffers(accelerator, [(nbytes, place)] * 2) as (source, target):
        copy = partial(accelerator.memory.copy, target, source, tag=_TAG)
        seconds = measure_seconds(accelerator, lambda: copy().wait(), shortest=shortest)
    return 2 * nbytes / seconds


def measure_link(accelerator: Accelerator, direction: Direction, nbytes: int) -> float:
    """Bytes per second between host memory and the device, in copies of `nbytes`; "both" at once counts the two
    together."""
    lanes = ("up", "down") if direction == "both" else (direction,)
    memory, streams = accelerator.memory, accelerator.streams

    def copy() -> None:
        before = streams.record()
        works = []
        for lane in lanes:
            with streams.lane(lane):
                works.append(memory.copy(*buffers[lane], after=before, tag=_TAG))
        for work in works:
            work.wait()

    wanted = [(nbytes, place) for lane in lanes for place in _ends(lane)]
    with _buffers(accelerator, wanted) as given:
        buffers = {lane: (given[2 * index], given[2 * index + 1]) for index, lane in enumerate(lanes)}
        seconds = measure_seconds(accelerator, copy)
    return len(lanes) * nbytes / seconds


def measure_matmul(accelerator: Accelerator, dtype: str, rows: int, *, shortest: float = SHORTEST_SECONDS) -> float:
    """Floating-point operations per second of the product of two square matrices.

    The numbers are random: a device that saves power multiplies equal numbers faster than it ever trains.
    """
    pattern = min(rows, _PATTERN)
    random = torch.randn(pattern, pattern, generator=torch.Generator().manual_seed(0), device="cpu")
    repeats = -(-rows // pattern)
    small = random.to(accelerator.device, getattr(torch, dtype))
    matrix = small.repeat(repeats, repeats)[:rows, :rows].contiguous()
    kept: list[Tensor] = []  # a result that nobody holds need not be computed

    def multiply() -> None:
        kept[:] = [matrix @ matrix]

    return 2 * rows**3 / measure_seconds(accelerator, multiply, shortest=shortest)


def measure_seconds(
    accelerator: Accelerator,
    action: Callable[[], object],
    *,
    shortest: float = SHORTEST_SECONDS,  # seconds on the device's clock that one measurement is to take
    repeats: int = 5,
    most_calls: int = 64,  # within one measurement
    patience: float = 0.1,  # seconds on our clock after which a measurement grows no longer
) -> float:
    """Seconds of one call of `action` on the device's clock: the median of repeated measurements, once it is warm.

    A call that is too quick for the clock is repeated within a measurement. Raises RuntimeError if the clock stands
    still.
    """
    calls = 1
    _measure(accelerator, action, 2)
    begun = time.perf_counter()  # a simulated device may be quick on its own clock and slow on ours
    while (seconds := _measure(accelerator, action, calls)) < shortest and calls < most_calls:
        if time.perf_counter() - begun > patience:
            break
        calls = min(4 * calls, most_calls)
    times = [seconds, *(_measure(accelerator, action, calls) for _ in range(repeats - 1))]
    median = statistics.median(times) / calls
    if not 0 < median < math.inf:
        raise RuntimeError(
            f"the clock of {accelerator.name} gives no time for {calls} calls, got {times} seconds; clock() must "
            "advance while work is done"
        )
    return median


def _measure(accelerator: Accelerator, action: Callable[[], object], calls: int) -> float:
    begun = accelerator.clock()
    for _ in range(calls):
        action()
    return accelerator.clock() - begun


def _ends(lane: str) -> tuple[Place, Place]:
    """Where the bytes of a lane go, and where they come from."""
    return (Place.DEVICE, Place.HOST) if lane == "up" else (Place.HOST, Place.DEVICE)


@contextmanager
def _buffers(accelerator: Accelerator, wanted: Sequence[tuple[int, Place]]) -> Iterator[list[Tensor]]:
    """Byte buffers, written once so that their pages exist, and given back at the end."""
    held: list[Tensor] = []
    try:
        for nbytes, place in wanted:
            held.append(accelerator.memory.empty((nbytes,), torch.uint8, place, tag=_TAG))
            held[-1].zero_()
        yield held
    finally:
        accelerator.streams.synchronize()
        for buffer in held:
            accelerator.memory.release(buffer)
