"""Level 0: what a backend declares about itself, and what holds where it does not."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from windlass.accelerator.counters import Counters
from windlass.accelerator.errors import Unsupported
from windlass.accelerator.interface import (
    INTERFACE_VERSION,
    Accelerator,
    Capabilities,
    Collectives,
    Memory,
    Streams,
)
from windlass.accelerator.kernels import Kernels
from windlass.conformance import device_workers as workers
from windlass.conformance.allocations import allocated, assert_holds, bring
from windlass.conformance.plugin import Run
from windlass.conformance.requirements import requires

FLAGS = sorted(field.name for field in fields(Capabilities) if isinstance(field.default, bool))
ADVICE = "use the slower schedule instead"
EVERY_FLAG = pytest.mark.parametrize("flag", FLAGS)


@requires(level=0, must="An accelerator has four facets, counters, capabilities, a device and a name with its index.")
def test_facets(accelerator: Accelerator) -> None:
    assert re.fullmatch(r"[^:]+:\d+", accelerator.name)
    assert isinstance(accelerator.device, torch.device)
    facets = (accelerator.memory, accelerator.streams, accelerator.collectives, accelerator.kernels)
    for facet, kind in zip(facets, (Memory, Streams, Collectives, Kernels), strict=True):
        assert isinstance(facet, kind)
    assert isinstance(accelerator.counters, Counters)
    assert isinstance(accelerator.capabilities, Capabilities)
    assert accelerator.interface_version[0] == INTERFACE_VERSION[0]


@requires(level=0, must="The facts of an accelerator can be written as JSON and say something.")
def test_facts(accelerator: Accelerator) -> None:
    assert accelerator.facts
    assert json.loads(json.dumps(accelerator.facts, allow_nan=False)).keys() == accelerator.facts.keys()


@requires(level=0, must="Capabilities are declared once and cannot be changed afterwards.")
def test_capabilities_are_fixed(accelerator: Accelerator) -> None:
    for flag in FLAGS:
        assert type(getattr(accelerator.capabilities, flag)) is bool
        with pytest.raises(FrozenInstanceError):
            setattr(accelerator.capabilities, flag, True)


@requires(level=0, must="Requiring a capability that is declared is silent.", needs=lambda flag: flag)
@EVERY_FLAG
def test_declared_is_granted(accelerator: Accelerator, flag: str) -> None:
    accelerator.capabilities.require(flag, ADVICE)


@requires(
    level=0,
    must="Requiring a capability that is not declared raises Unsupported with its name and the advice.",
    without=lambda flag: flag,
)
@EVERY_FLAG
def test_undeclared_is_refused(accelerator: Accelerator, flag: str) -> None:
    accelerator.capabilities.require("dtypes", ADVICE)  # the control: there is always one
    with pytest.raises(Unsupported) as caught:
        accelerator.capabilities.require(flag, ADVICE)
    assert flag in str(caught.value)
    assert ADVICE in str(caught.value)


@requires(level=0, must="Requiring a capability that does not exist raises ValueError, which Unsupported is not.")
def test_unknown_capability(accelerator: Accelerator) -> None:
    with pytest.raises(ValueError, match="teleportation"):
        accelerator.capabilities.require("teleportation", ADVICE)


@requires(
    level=0,
    must="A lazy device gives the right values of many small operations, wherever they are flushed.",
    needs="lazy",
)
def test_lazy(accelerator: Accelerator) -> None:
    accelerator.capabilities.require("lazy", "nothing is deferred here, and there is nothing to test")
    check_small_operations(accelerator)


@requires(level=0, must="A device that is not lazy takes new shapes and values as they come.", without="lazy")
def test_not_lazy(accelerator: Accelerator) -> None:
    check_small_operations(accelerator)
    for count in range(1, 60):
        host = torch.arange(float(count))
        assert accelerator.read_host(bring(accelerator, host).sum(), tag="conformance") == [count * (count - 1) / 2]


def check_small_operations(accelerator: Accelerator) -> None:
    with allocated(accelerator, torch.zeros(9)) as total:
        one = bring(accelerator, torch.ones(9))
        for step in range(1, 4):
            for _ in range(50):
                total.add_(one)
                one = one * 1.0
            accelerator.streams.boundary()
            assert_holds(accelerator, total, torch.full((9,), 50.0 * step))


@requires(
    level=0,
    must="One program takes the part of any rank by an offset that is a tensor.",
    needs="uniform_program",
)
def test_uniform_program(accelerator: Accelerator) -> None:
    accelerator.capabilities.require("uniform_program", "ranks may run programs of their own, nothing is uniform")
    check_part_by_tensor(accelerator)


@requires(
    level=0,
    must="Ranks may allocate and compute on shapes of their own.",
    needs="ranks:2",
    without="uniform_program",
)
def test_program_of_its_own(accelerator: Accelerator, run: Run) -> None:
    check_part_by_tensor(accelerator)
    assert run(workers.compute_on_a_shape_of_its_own, 2) == [3.0, 3.0]


def check_part_by_tensor(accelerator: Accelerator) -> None:
    host = torch.arange(40.0)
    whole, steps = bring(accelerator, host), bring(accelerator, torch.arange(10))
    for rank in range(4):
        offset = bring(accelerator, torch.tensor(10 * rank))
        assert_holds(accelerator, whole.index_select(0, steps + offset), host[10 * rank : 10 * rank + 10])


@requires(
    level=0,
    must="Several ranks may open the same device, each with memory and accounts of its own.",
    needs=("shared_device", "ranks:2"),
)
def test_shared_device(accelerator: Accelerator, run: Run) -> None:
    accelerator.capabilities.require("shared_device", "give each rank a device of its own, a second one may hang")
    assert set(run(workers.share_the_device, 2, accelerator.name)) == {accelerator.name}


@requires(level=0, must="An accelerator may be closed twice.", needs="ranks:1")
def test_close_twice(run: Run) -> None:
    (name,) = run(workers.close_twice, 1)
    assert name


@requires(level=0, must="Loading the module of a backend imports no framework and opens no device.")
def test_import_is_light(accelerator: Accelerator, run: Run) -> None:
    assert workers.frameworks_after_loading(accelerator.name.partition(":")[0]) == []
