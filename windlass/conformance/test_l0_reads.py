"""Level 0: how values come to the host: reads, copies, bytes, and the device's clock."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import Tensor

from windlass.accelerator.counters import Tally
from windlass.accelerator.interface import Accelerator
from windlass.conformance.allocations import (
    FLOATS,
    INTEGERS,
    allocated,
    assert_same_bits,
    bring,
    dtype_named,
    random_bits,
)
from windlass.conformance.requirements import requires

READ = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
VALUES = [1.5, -2.0, 0.0, -0.0, 0.0625, 240.0, 2.0**-14, math.inf, -math.inf, math.nan]
FORMATS = {"float32": "<f", "float16": "<e", "float64": "<d", "uint8": "<B", "int32": "<i", "int64": "<q"}


@requires(
    level=0,
    must="`read_host` returns every value of a small tensor as a float, in order and exactly.",
    needs=lambda dtype: f"dtypes:{dtype}",
)
@READ
def test_read_host(accelerator: Accelerator, dtype: str) -> None:
    tensor = bring(accelerator, torch.tensor(VALUES, dtype=dtype_named(dtype)))
    for shape in ((10,), (2, 5), (1, 10, 1)):
        found = accelerator.read_host(tensor.view(shape), tag="conformance")
        assert isinstance(found, list)
        assert all(type(value) is float for value in found)
        assert [struct.pack("<d", value) for value in found[:9]] == [struct.pack("<d", value) for value in VALUES[:9]]
        assert math.isnan(found[9])
    assert accelerator.read_host(tensor[0], tag="conformance") == [1.5]
    assert accelerator.read_host(tensor[:0], tag="conformance") == []
    assert accelerator.read_host(tensor[3:7], tag="conformance") == VALUES[3:7]


@requires(level=0, must="`read_host` gives the smallest numbers of float32 as they are.")
def test_read_host_of_subnormal_numbers(accelerator: Accelerator) -> None:
    tensor = bring(accelerator, torch.tensor([1, 12345, -0x7FFFFFFF], dtype=torch.int32).view(torch.float32))
    assert accelerator.read_host(tensor, tag="conformance") == [2.0**-149, 12345 * 2.0**-149, -(2.0**-149)]


@requires(level=0, must="`read_host` sees the copies that were waited for and whatever was computed before.")
def test_read_host_sees_what_went_before(accelerator: Accelerator) -> None:
    with allocated(accelerator, torch.zeros(4)) as source, allocated(accelerator, torch.zeros(4)) as destination:
        for number in range(1, 6):
            source.fill_(number)
            accelerator.memory.copy(destination, source).wait()
            assert accelerator.read_host(destination * 2, tag="conformance") == [2.0 * number] * 4


@requires(level=0, must="`read_host` takes a tensor that is part of a graph.")
def test_read_host_of_a_loss(accelerator: Accelerator) -> None:
    weight = bring(accelerator, torch.tensor([2.0, 3.0])).requires_grad_()
    assert accelerator.read_host((weight * weight).sum(), tag="conformance") == [13.0]


@requires(level=0, must="Every read of the host is counted once, whatever its tag.")
def test_reads_are_counted(accelerator: Accelerator) -> None:
    tensor = bring(accelerator, torch.ones(3))
    accelerator.streams.boundary()
    before = accelerator.counters.host_reads
    for number, tag in enumerate(("step", "conformance", "evaluation"), start=1):
        accelerator.read_host(tensor, tag=tag)
        assert accelerator.counters.host_reads == before + number
    assert accelerator.counters.snapshot()["host"] == {"reads": before + 3}
    accelerator.streams.boundary()


@requires(level=0, must="Every step may read the host once, and others may read it besides.")
def test_one_read_in_each_step(accelerator: Accelerator) -> None:
    tensor = bring(accelerator, torch.tensor([1.0, 2.0]))
    accelerator.streams.boundary()
    for number in range(1, 5):
        assert accelerator.read_host(tensor * number) == [1.0 * number, 2.0 * number]
        for _ in range(3):
            assert accelerator.read_host(tensor, tag="logging") == [1.0, 2.0]
        accelerator.streams.boundary()


@requires(level=0, must="`to_host` returns an ordinary host tensor that shares nothing with its source.")
def test_to_host(accelerator: Accelerator) -> None:
    values = random_bits(1001, torch.int32)
    with allocated(accelerator, values) as tensor:
        host = accelerator.to_host(tensor)
        assert host.device.type == "cpu"
        tensor.fill_(-1)
        assert_same_bits(host, values)
        host.fill_(-2)
        assert_same_bits(accelerator.to_host(tensor), torch.full_like(values, -1))
        assert_same_bits(accelerator.to_host(tensor[3:10]), torch.full((7,), -1, dtype=torch.int32))
    weight = bring(accelerator, torch.ones(3)).requires_grad_()
    assert not accelerator.to_host(weight).requires_grad


@requires(level=0, must="`to_host` is counted as a copy 'down' under the tag 'to_host', with its bytes.")
def test_to_host_is_counted(accelerator: Accelerator) -> None:
    tensor = bring(accelerator, torch.ones(1001, dtype=torch.int64))
    before = Tally(*vars(accelerator.counters.copies["down", "to_host"]).values())
    accelerator.to_host(tensor)
    accelerator.to_host(tensor[:3])
    wanted = Tally(before.calls + 2, before.bytes + 8 * 1001 + 8 * 3)
    assert accelerator.counters.copies["down", "to_host"] == wanted


def pack(values: list[float], dtype: str) -> bytes:
    """Little-endian bytes as the formats of IEEE 754 define them; bfloat16 is the upper half of float32."""
    if dtype == "bfloat16":
        return b"".join(struct.pack("<f", value)[2:] for value in values)
    return b"".join(struct.pack(FORMATS[dtype], value) for value in values)


def check_bytes(accelerator: Accelerator, dtype: str) -> None:
    numbers: list[float] = [1.5, -2.0, 0.0, 240.0, -0.0, 0.0625] if dtype_named(dtype).is_floating_point else []
    numbers = numbers or [1, 2, 0, 240, 7, 100]
    turned = [numbers[index] for index in (0, 3, 1, 4, 2, 5)]
    with allocated(accelerator, torch.tensor(numbers, dtype=dtype_named(dtype))) as tensor:
        assert accelerator.to_bytes(tensor) == pack(numbers, dtype)
        assert accelerator.to_bytes(tensor[1:4]) == pack(numbers[1:4], dtype)
        assert accelerator.to_bytes(tensor[2]) == pack(numbers[2:3], dtype)
        assert accelerator.to_bytes(tensor[:0]) == b""
        assert accelerator.to_bytes(tensor.view(2, 3)) == pack(numbers, dtype)
        assert accelerator.to_bytes(tensor.view(2, 3).t()) == pack(turned, dtype)


@requires(level=0, must="`to_bytes` gives the little-endian bytes of integers, row by row.")
@pytest.mark.parametrize("dtype", INTEGERS)
def test_bytes_of_integers(accelerator: Accelerator, dtype: str) -> None:
    check_bytes(accelerator, dtype)


@requires(
    level=0,
    must="`to_bytes` gives the little-endian bytes of floats, row by row.",
    needs=lambda dtype: f"dtypes:{dtype}",
)
@READ
def test_bytes_of_floats(accelerator: Accelerator, dtype: str) -> None:
    check_bytes(accelerator, dtype)


@requires(level=0, must="`to_bytes` gives the little-endian bytes of float64 where it is declared.", needs="float64")
def test_bytes_of_doubles(accelerator: Accelerator) -> None:
    check_bytes(accelerator, "float64")


@requires(
    level=0,
    must="`to_bytes` keeps every bit pattern of a floating dtype.",
    needs=lambda dtype: f"dtypes:{dtype}",
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_of_every_pattern(accelerator: Accelerator, dtype: str) -> None:
    values = random_bits(5000, dtype_named(dtype))
    with allocated(accelerator, values) as tensor:
        assert accelerator.to_bytes(tensor) == bytes(values.view(torch.uint8).tolist())


@requires(level=0, must="The clock counts seconds forwards, and is read once all issued work is over.")
def test_clock(accelerator: Accelerator) -> None:
    times = [accelerator.clock()]
    with allocated(accelerator, torch.zeros(100_000)) as source, allocated(accelerator, torch.zeros(100_000)) as target:
        for _ in range(5):
            work = accelerator.memory.copy(target, source)
            times.append(accelerator.clock())
            assert work.done(), "the clock was read while work was under way"
            work.wait()
    assert all(type(time) is float for time in times)
    assert times == sorted(times)
    assert times[-1] > times[0], "five copies take time"


def softplus_and_sum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.softplus(x) * y, (x + y).sum(0)


@requires(level=0, must="A compiled function returns what the function returns, for every shape.")
def test_compile(accelerator: Accelerator) -> None:
    compiled = accelerator.compile(softplus_and_sum)
    generator = torch.Generator().manual_seed(0)
    for shape in ((4, 8), (1, 1), (5, 8)):
        x, y = (torch.randn(shape, generator=generator) for _ in range(2))
        found = compiled(bring(accelerator, x), bring(accelerator, y))
        wanted = softplus_and_sum(x.double(), y.double())
        for one, other in zip(found, wanted, strict=True):
            assert float((accelerator.to_host(one).double() - other).abs().max()) < 1e-5
