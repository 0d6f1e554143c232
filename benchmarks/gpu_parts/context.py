"""What every measurement of a worker needs: the device, the scale, a stopwatch, the floors, and a look at the peak."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gpu_parts.rows import Row, describe_error
from windlass.accelerator.interface import Accelerator
from windlass.rates import measure_copy, measure_matmul, measure_seconds

Scale = Literal["full", "small"]
Candidate = tuple[str, bool, Callable[[], object]]
"""Who does it, whether that is what windlass uses, and one call."""


_SHORTEST = 20e-3  # seconds of one measurement at full scale, of floors and of what is held against them


@dataclass
class Context:
    """One open device and how large things are."""

    accelerator: Accelerator
    scale: Scale

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def size(self, full: int, small: int) -> int:
        """One of two sizes."""
        return full if self.scale == "full" else small

    def seconds(self, action: Callable[[], object]) -> float:
        """Of one call: the median of measurements of 20 ms and more, once it is warm."""
        if self.scale == "small":
            return measure_seconds(self.accelerator, action, shortest=1e-4, repeats=1, most_calls=1)
        return measure_seconds(self.accelerator, action, shortest=_SHORTEST, repeats=7, most_calls=256, patience=2.0)

    @functools.cached_property
    def copy_rate(self) -> float:
        """Bytes read and written per second by a copy that no cache holds: the floor of what moves bytes."""
        return measure_copy(self.accelerator, self.size(2**30, 2**18), shortest=_SHORTEST)

    def matmul_rate(self, dtype: str) -> float:
        """Operations per second of a large product in `dtype`: the floor of what multiplies matrices."""
        return self._matmul_rates(dtype)

    @functools.cached_property
    def _matmul_rates(self) -> Callable[[str], float]:
        sizes = (4096, 8192) if self.scale == "full" else (64,)
        measure = functools.partial(measure_matmul, self.accelerator, shortest=_SHORTEST)
        return functools.cache(lambda dtype: max(measure(dtype, size) for size in sizes))

    def product_dtype(self, wanted: str) -> str:
        """`wanted` where the device multiplies in it at full speed, float32 otherwise."""
        return wanted if wanted in self.accelerator.capabilities.matmul_dtypes else "float32"

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Normal numbers on the device."""
        return torch.randn(*shape, device=self.device).mul_(scale).to(dtype)

    def scalar(self, value: float | bool) -> Tensor:
        """A 0-d tensor on the device."""
        return torch.tensor(value).to(self.device)

    def implementations(self, kernel: str, *arguments: Any, **named: Any) -> Iterator[Candidate]:
        """Each registered implementation of a kernel, called with these arguments."""
        chosen = self.accelerator.kernels.chosen()[kernel]
        for one in self.accelerator.kernels.implementations(kernel):
            call = functools.partial(self.accelerator.kernels.bind(one), *arguments, **named)
            yield f"windlass {one.implementation}", one.implementation == chosen, call

    def compare(
        self,
        name: str,
        case: str,
        candidates: Iterable[Candidate],
        *,
        nbytes: float | None = None,  # that one call must read and write
        operations: float | None = None,  # that one call is said to make, by formula
        dtype: str = "",  # in which operations are made
        part: str = "kernels",
    ) -> Iterator[Row]:
        """A row for each candidate; one that fails is a row too, unless it takes the device with it."""
        for by, ours, call in candidates:
            try:
                seconds = self.seconds(call)
            except Exception as error:
                self.require_health(error)
                yield Row(part, name, case, by, ours, error=describe_error(error))
                continue
            value = share = None
            unit = ""
            if nbytes is not None:
                value, unit = nbytes / seconds, "B/s"
                share = value / self.copy_rate
            elif operations is not None:
                value, unit = operations / seconds, "FLOP/s"
                share = value / self.matmul_rate(dtype)
            yield Row(part, name, case, by, ours, seconds, value, unit, share)

    def peak_of(self, call: Callable[[], object]) -> int | None:
        """Bytes that torch's allocator held at most during a call, beyond those before; None where it does not say."""
        module = getattr(self.accelerator, "module", None)
        read, reset = (getattr(module, name, None) for name in ("max_memory_allocated", "reset_peak_memory_stats"))
        if read is None or reset is None:
            return None
        self.release()
        reset()
        before = int(module.memory_allocated())  # type: ignore[union-attr]
        result = call()
        self.accelerator.streams.synchronize()
        peak = int(read())
        del result
        return peak - before

    def peak(self) -> int | None:
        """Bytes that torch's allocator held at most since `release`; None where it does not say."""
        read = getattr(getattr(self.accelerator, "module", None), "max_memory_allocated", None)
        return None if read is None else int(read())

    def release(self) -> None:
        """Give memory that nobody holds back to the device, and let the peak start anew."""
        gc.collect()
        self.accelerator.streams.synchronize()
        module = getattr(self.accelerator, "module", None)
        for name in ("empty_cache", "reset_peak_memory_stats"):
            if callable(give_back := getattr(module, name, None)):
                give_back()

    def require_health(self, error: BaseException) -> None:
        """Raise `DeviceLost` if the device does not compute any more, as after an access outside its memory."""
        try:
            self.accelerator.clock()
            healthy = float(torch.ones(4, device=self.device).sum().to("cpu")) == 4.0
        except RuntimeError:
            healthy = False
        if not healthy:
            raise DeviceLost(describe_error(error)) from error


class DeviceLost(RuntimeError):
    """The device answers no more in this process; another process may have it."""
