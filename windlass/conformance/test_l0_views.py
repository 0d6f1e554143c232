"""Level 0: views of an allocation: where they are promised they alias it, and slices work at once anywhere."""

from __future__ import annotations

import torch
from torch import nn

from windlass.accelerator.interface import Accelerator
from windlass.conformance.allocations import allocated, assert_holds, random_bits
from windlass.conformance.requirements import requires

HOST = torch.arange(60.0)


def changed(begin: int, end: int, value: float) -> torch.Tensor:
    """The host's values with a part overwritten."""
    wanted = HOST.clone()
    wanted[begin:end] = value
    return wanted


@requires(level=0, must="A slice of an allocation can be read and written at once.")
def test_slice_at_once(accelerator: Accelerator) -> None:
    with allocated(accelerator, HOST) as whole:
        assert_holds(accelerator, whole[7:20], HOST[7:20])
        assert_holds(accelerator, whole[7:20] * 2, HOST[7:20] * 2)
        whole[10:15].fill_(-1.0)
        assert_holds(accelerator, whole, changed(10, 15, -1.0))
        whole[10:15].copy_(whole[30:35])
        wanted = HOST.clone()
        wanted[10:15] = HOST[30:35]
        assert_holds(accelerator, whole, wanted)
        assert_holds(accelerator, whole.view(6, 10)[2:4], wanted.view(6, 10)[2:4])


@requires(level=0, must="A view and its allocation see each other's writes, over boundaries too.", needs="views")
def test_view_aliases(accelerator: Accelerator) -> None:
    with allocated(accelerator, HOST) as whole:
        view, inner = whole[10:30], whole[10:30].view(4, 5)[1]
        for step in range(1, 4):
            view.fill_(float(-step))
            wanted = changed(10, 30, float(-step))
            assert_holds(accelerator, whole, wanted)
            accelerator.streams.boundary()
            whole[15:17].fill_(99.0)
            wanted[15:17] = 99.0
            assert_holds(accelerator, view, wanted[10:30], "the view")
            assert_holds(accelerator, inner, wanted[15:20], "the view of the view")
            accelerator.streams.boundary()


@requires(
    level=0, must="A parameter can live in its region: an update of the one is an update of the other.", needs="views"
)
def test_parameter_in_its_region(accelerator: Accelerator) -> None:
    with allocated(accelerator, HOST) as region:
        module = nn.Linear(5, 4, bias=False)
        module.weight = nn.Parameter(region[20:40].view(4, 5))
        for step in range(1, 4):
            region[20:40].fill_(float(step))
            accelerator.streams.boundary()
            result = module(torch.ones(1, 5).to(accelerator.device))
            assert accelerator.read_host(result, tag="conformance") == [5.0 * step] * 4
            with torch.no_grad():
                module.weight.mul_(2)
            assert_holds(accelerator, region, changed(20, 40, 2.0 * step))
        del module, result


@requires(level=0, must="One buffer can be read and written as several dtypes.", needs="views")
def test_buffer_of_several_dtypes(accelerator: Accelerator) -> None:
    values = random_bits(256, torch.uint8)
    with allocated(accelerator, values) as buffer:
        views = {dtype: buffer[64:128].view(dtype) for dtype in (torch.int32, torch.float32, torch.int64)}
        accelerator.streams.boundary()
        for dtype, view in views.items():
            assert_holds(accelerator, view, values[64:128].view(dtype))
        views[torch.int32][:4].fill_(-2)
        accelerator.streams.boundary()
        wanted = values.clone()
        wanted[64:80].view(torch.int32).fill_(-2)
        assert_holds(accelerator, buffer, wanted)
        assert_holds(accelerator, views[torch.int64], wanted[64:128].view(torch.int64))


@requires(
    level=0,
    must="Where views are not promised, a parameter is written from its region and trains all the same.",
    without="views",
)
def test_parameter_beside_its_region(accelerator: Accelerator) -> None:
    module = nn.Linear(5, 4, bias=False).to(accelerator.device)
    with allocated(accelerator, HOST) as region:
        for step in range(1, 4):
            region[20:40].fill_(float(step))
            with torch.no_grad():
                module.weight.copy_(region[20:40].view(4, 5))
            accelerator.streams.boundary()
            result = module(torch.ones(1, 5).to(accelerator.device))
            assert accelerator.read_host(result, tag="conformance") == [5.0 * step] * 4
