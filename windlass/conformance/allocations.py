"""Allocations of a test: filled from the host, compared to the bit, and given back however the test ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator, Place

FLOATS: Final = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
"""Floating dtypes that a backend may declare; float64 is a capability of its own."""
INTEGERS: Final = ("uint8", "int32", "int64")
"""Dtypes that memory always takes."""
TAG: Final = "conformance"


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype of this name."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def random_bits(count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """`count` elements on the host with every kind of bit pattern, the payloads of nan included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8).view(dtype)


def bring(accelerator: Accelerator, host: Tensor) -> Tensor:
    """A tensor of one's own on the device, outside the memory facet, with the values of a host tensor."""
    return host.to(accelerator.device, copy=True)


def bring_number(accelerator: Accelerator, value: float) -> Tensor:
    """A number as data on the device, of no dimension. It goes there as a vector: a compiler may take 0 and 1 that come
    without a dimension for constants."""
    return torch.tensor([value], dtype=torch.float32, device="cpu").to(accelerator.device).reshape(())


@contextmanager
def allocated(
    accelerator: Accelerator, host: Tensor, place: Place = Place.DEVICE, *, tag: str = TAG
) -> Iterator[Tensor]:
    """An allocation that holds the values of a host tensor, released at the end of the block."""
    tensor = accelerator.memory.empty(host.shape, host.dtype, place, tag=tag)
    try:
        tensor.copy_(host)
        yield tensor
    finally:
        accelerator.memory.release(tensor)


def used(accelerator: Accelerator, place: Place = Place.DEVICE) -> int:
    """Bytes allocated in a place now, which the facet that allocated them knows exactly.

    Memory of another place may count until the device, which might still be copying from it, is done.
    """
    if place is not Place.DEVICE:
        accelerator.streams.synchronize()
    measure = accelerator.memory.stats(place).used
    assert measure.kind == "exact", f"'used' of the {place.value} must be exact, got {measure}"
    assert measure.value is not None
    return measure.value


def peak(accelerator: Accelerator, place: Place = Place.DEVICE) -> int:
    """The most bytes that were allocated in a place at once since `reset_peak`."""
    measure = accelerator.memory.stats(place).peak
    assert measure.kind == "exact", f"'peak' of the {place.value} must be exact, got {measure}"
    assert measure.value is not None
    return measure.value


def raw(host: Tensor) -> Tensor:
    """The bytes of a host tensor as a vector."""
    return host.contiguous().view(-1).view(torch.uint8)


def assert_same_bits(found: Tensor, wanted: Tensor, what: str = "the tensor") -> None:
    """Both on the host: the same shape, dtype and bytes."""
    assert found.shape == wanted.shape, f"{what} has shape {tuple(found.shape)}, wanted {tuple(wanted.shape)}"
    assert found.dtype == wanted.dtype, f"{what} is of {found.dtype}, wanted {wanted.dtype}"
    different = (raw(found) != raw(wanted)).nonzero().flatten()
    if different.numel():
        at = int(different[0]) // wanted.element_size()
        raise AssertionError(
            f"{what}: {different.numel()} of {raw(wanted).numel()} bytes differ, the first in element {at}, which is "
            f"{found.reshape(-1)[at].item()} where {wanted.reshape(-1)[at].item()} is wanted"
        )


def assert_holds(accelerator: Accelerator, tensor: Tensor, wanted: Tensor, what: str = "the tensor") -> None:
    """A tensor of the device or of any place has the bits of a host tensor."""
    assert_same_bits(accelerator.to_host(tensor), wanted, what)
