"""What belongs to the program of a device that compiles, how it is told, and how many programs that makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from sim_parts import Parts, open_parts
from windlass.accelerator.counters import ProgramCounts
from windlass.accelerator.errors import Unsupported
from windlass.accelerator.interface import Place
from windlass.backends.sim.agreement import describe_difference
from windlass.backends.sim.device import SimAccelerator, open_sim
from windlass.backends.sim.settings import SimSettings


@pytest.fixture
def parts() -> Iterator[Parts]:
    with open_parts(uniform=True) as opened:
        yield opened


@pytest.fixture
def accelerator() -> Iterator[SimAccelerator]:
    opened = open_sim(0, SimSettings(delay_ms=0.0, uniform=True))
    yield opened
    opened.close()


def allocate(parts: Parts, *shape: int, place: Place = Place.DEVICE, tag: str = "weights") -> Tensor:
    """An allocation of ones, filled by an operation that is over with the boundary."""
    tensor = parts.memory.empty(shape, torch.float32, place, tag=tag).fill_(1.0)
    parts.streams.boundary()
    return tensor


def program_of(parts: Parts, run: Callable[[], object]) -> tuple[str, ...]:
    """What the device takes for a program of what is run between two boundaries."""
    assert parts.conductor.program is not None
    parts.streams.boundary()
    kept = run()  # nothing is freed before the boundary
    parts.streams.boundary()
    del kept
    return parts.conductor.program.last


def counts_of(parts: Parts) -> ProgramCounts:
    assert parts.conductor.program is not None
    return parts.conductor.program.counts


# -- what belongs to it ------------------------------------------------------------------------------------------------


def test_what_does_not_touch_the_device_is_no_part(parts: Parts) -> None:
    allocate(parts, 4)
    pinned = allocate(parts, 4, place=Place.HOST)

    def prepare() -> object:
        batch = torch.randn(8, 4).softmax(1)
        model = nn.Linear(4, 2)
        pinned.mul_(2.0)
        return model(batch).sum().item(), pinned[1:].sum(), torch.randperm(5)

    assert program_of(parts, prepare) == ()


def test_what_touches_the_device_is_part_with_what_follows_from_it(parts: Parts) -> None:
    weights = allocate(parts, 4)
    batch = torch.ones(3, 4)
    assert program_of(parts, lambda: (batch.clone() * weights).sum(1, keepdim=True).relu_()) == (
        "aten.mul.Tensor(float32[3, 4], 'weights'[0:4] float32 %1)",
        "aten.sum.dim_IntList(float32[3, 4] %2, [1], True)",
        "aten.relu_.default(float32[3, 1] %3)",
    )


def test_a_view_is_told_where_it_is_used(parts: Parts) -> None:
    weights = allocate(parts, 8)

    def run() -> object:
        matrix = weights.view(2, 4)
        return weights[2:4].neg(), matrix[1].neg(), matrix.t().neg(), matrix[:, 1:3].view(torch.int32).neg()

    assert program_of(parts, run) == (
        "aten.neg.default('weights'[2:4] float32 %1)",
        "aten.neg.default('weights'[4:8] float32 %1)",
        "aten.neg.default('weights' float32[4, 2] strides [1, 4] %1)",
        "aten.neg.default('weights' int32[2, 2] from 1 strides [4, 1] %1)",
    )


def test_a_view_that_nobody_uses_is_nothing(parts: Parts) -> None:
    weights = allocate(parts, 8)
    assert program_of(parts, lambda: (weights[2:4], weights.view(2, 4).t(), weights.detach())) == ()


def test_results_of_one_shape_are_told_apart(parts: Parts) -> None:
    weights = allocate(parts, 4)

    def run(which: int) -> object:
        results = weights.exp(), weights.cos()
        return results, results[which].neg()

    first, second = (program_of(parts, lambda which=which: run(which)) for which in (0, 1))  # type: ignore[misc]
    assert first[:2] == second[:2] == ("aten.exp.default('weights'[0:4] float32 %1)", second[1])
    assert (first[2], second[2]) == ("aten.neg.default(float32[4] %2)", "aten.neg.default(float32[4] %3)")


def test_what_is_written_from_the_device_lies_there(parts: Parts) -> None:
    weights = allocate(parts, 4)
    slot, made_like = torch.zeros(4), torch.empty_like(weights)
    program_of(parts, lambda: slot.copy_(weights))
    assert program_of(parts, lambda: (slot.neg(), made_like.zero_())) == (
        "aten.neg.default(float32[4] %1)",
        "aten.zero_.default(float32[4] %3)",
    )


def test_parameter_lies_on_the_device_once_an_operation_there_has_read_it(parts: Parts) -> None:
    weights, layer = allocate(parts, 4), nn.Linear(2, 2, bias=False)
    assert program_of(parts, lambda: layer.weight.neg()) == ()
    program_of(parts, lambda: weights.copy_(layer.weight.detach().view(-1)))
    assert program_of(parts, lambda: layer.weight.neg()) == ()  # its detached values were an input
    with torch.no_grad():
        program_of(parts, lambda: weights.view(2, 2).copy_(layer.weight))
    assert program_of(parts, lambda: layer.weight.neg()) == ("aten.neg.default(float32[2, 2] %1)",)


def test_memory_of_the_device_that_became_the_hosts_is_the_hosts(parts: Parts) -> None:
    weights = allocate(parts, 1000)

    def run() -> None:
        address = weights.neg().data_ptr()  # gone at once
        found = [host for host in (torch.ones(1000) for _ in range(20)) if host.data_ptr() == address]
        for host in found:
            host.neg()

    assert program_of(parts, run) == ("aten.neg.default('weights'[0:1000] float32 %1)",)


def test_moving_at_the_boundary_changes_nothing(parts: Parts) -> None:
    weights = allocate(parts, 4)
    before = weights.data_ptr()
    first = program_of(parts, lambda: weights[1:3].add_(1.0))
    assert weights.data_ptr() != before
    assert program_of(parts, lambda: weights[1:3].add_(1.0)) == first


def test_backward_belongs_to_it(parts: Parts) -> None:
    weights = allocate(parts, 4).requires_grad_()
    assert program_of(parts, lambda: (weights * 3.0).sum().backward()) == (
        "aten.mul.Tensor('weights'[0:4] float32 %1, 3.0)",
        "aten.sum.default(float32[4] %2)",
        "aten.ones_like.default(float32[] %3, memory_format=torch.preserve_format)",
        "aten.mul.Tensor(float32[4] strides [0] %4, 3.0)",
    )


def test_copies_and_kernels_and_collectives(accelerator: SimAccelerator) -> None:
    memory, world = accelerator.memory, accelerator.collectives.world
    weights = memory.empty((4,), torch.float32, tag="weights")
    pinned = [memory.empty((8,), torch.float32, place, tag="pinned") for place in (Place.HOST, Place.DISK)]
    pinned[0].fill_(2.0)
    memory.copy(weights, pinned[0][4:], tag="fetch").wait()
    memory.copy(*pinned, tag="spill").wait()
    squares = accelerator.kernels["square_sum"](weights, torch.tensor(0.5))
    accelerator.collectives.all_reduce(squares[:1], world, tag="norm").wait()
    accelerator.collectives.all_to_all(weights[:2], weights[2:], [2], [2], world).wait()
    accelerator.streams.boundary()
    program = accelerator._conductor.program
    assert program is not None
    assert program.last == (
        "copy 'fetch'(destination='weights'[0:4] float32 %1, source=float32[4])",
        "kernel 'square_sum'(values='weights'[0:4] float32 %1, scale=float32[] %2)",
        "all_reduce 'norm' of 4 bytes of float32 in group 'world' of 1(outputs=[float32[1] %3], inputs=[])",
        "all_to_all of float32 in group 'world' of 1(outputs=['weights'[0:2] float32 %1], "
        "inputs=['weights'[2:4] float32 %1], output_splits=[2], input_splits=[2])",
    )


def test_copy_for_the_host_is_no_part_and_lies_there(accelerator: SimAccelerator) -> None:
    weights = accelerator.memory.empty((4,), torch.float32).fill_(3.0)
    accelerator.streams.boundary()
    host = accelerator.to_host(weights[1:]).mul_(2.0)
    assert accelerator.to_bytes(weights[:1]) == b"\x00\x00\x40\x40"
    accelerator.streams.boundary()
    assert host.tolist() == [6.0] * 3
    assert accelerator.program_counts() == ProgramCounts(compiled=1, executed=1)  # the first one


# -- how many programs that makes --------------------------------------------------------------------------------------


def test_number_in_a_tensor_is_no_part_of_the_program(parts: Parts) -> None:
    weights, before = allocate(parts, 4), ProgramCounts(compiled=1, executed=1)
    assert counts_of(parts) == before
    for step in range(5):
        weights.sub_(torch.tensor(0.1 * step) * weights)
        parts.streams.boundary()
    assert counts_of(parts) == ProgramCounts(compiled=2, executed=6)


def test_number_of_python_makes_a_program_of_each_value(parts: Parts) -> None:
    weights = allocate(parts, 4)
    for rate in (0.1, 0.2, 0.1, 0.3):
        weights.sub_(weights, alpha=rate)
        parts.streams.boundary()
    assert counts_of(parts) == ProgramCounts(compiled=1 + 3, executed=1 + 4)


def test_new_shape_makes_a_new_program(parts: Parts) -> None:
    weights = allocate(parts, 4)
    for rows in (2, 3, 2):
        torch.ones(rows, 4).matmul(weights)
        parts.streams.boundary()
    assert counts_of(parts) == ProgramCounts(compiled=1 + 2, executed=1 + 3)


def test_step_without_an_operation_runs_nothing(parts: Parts) -> None:
    allocate(parts, 4)
    for _ in range(3):
        torch.ones(4).neg()
        parts.streams.boundary()
    assert counts_of(parts) == ProgramCounts(compiled=1, executed=1)


@pytest.mark.parametrize(
    ("read", "programs"),
    [
        (lambda parts, loss: parts.conductor.read_host(loss, "step"), 2),
        (lambda parts, loss: parts.conductor.read_host(loss, "logging"), 1),
        (lambda parts, loss: loss.item(), 2),
    ],
)
def test_read_after_a_backward_cuts_the_program(
    parts: Parts, read: Callable[[Parts, Tensor], object], programs: int
) -> None:
    weights = allocate(parts, 4).requires_grad_()
    before = counts_of(parts)
    for _ in range(3):
        loss = (weights * 2.0).sum()
        loss.backward()
        read(parts, loss)
        with torch.no_grad():
            weights.neg_()
        parts.streams.boundary()
    assert counts_of(parts).executed == before.executed + 3 * programs
    # The gradient is new in the first step and added to in the others; what follows the read is the same in all.
    assert counts_of(parts).compiled == before.compiled + 2 + (programs == 2)


def test_read_before_a_backward_cuts_nothing(parts: Parts) -> None:
    weights = allocate(parts, 4).requires_grad_()
    before = counts_of(parts)
    loss = (weights * 2.0).sum()
    parts.conductor.read_host(loss, "step")
    loss.backward()
    parts.streams.boundary()
    assert counts_of(parts) == ProgramCounts(before.compiled + 1, before.executed + 1)


# -- the setting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uniform", [True, False])
def test_setting_is_declared(uniform: bool) -> None:
    accelerator = open_sim(0, SimSettings(uniform=uniform))
    assert accelerator.capabilities.uniform_program is uniform
    assert accelerator.capabilities.lazy is uniform
    assert accelerator.facts["uniform"] is uniform
    if not uniform:
        with pytest.raises(Unsupported, match=r"sim:0 compiles no programs .* set WINDLASS_SIM=uniform=true"):
            accelerator.program_counts()
    accelerator.close()


# -- what differs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("programs", "wanted"),
    [
        (
            [["a()", "b(1)"], ["a()", "b(2)"]],
            "operation 2 since the boundary before is, on rank 0: b(1); rank 1: b(2);",
        ),
        ([["a()"], ["a()", "b()"]], "is, on rank 0: none, the program is over; rank 1: b();"),
        (
            [["a()"], [], ["a()"], ["a()"]],
            "operation 1 since the boundary before is, on ranks 0, 2 and 3: a(); rank 1: ",
        ),
    ],
)
def test_first_difference_is_described(programs: list[list[str]], wanted: str) -> None:
    assert wanted in describe_difference(programs)


def test_long_operations_are_shown_where_they_differ() -> None:
    same = ", ".join(["float32[4]"] * 500)
    text = describe_difference([[f"stack([{same}, 1.0, {same}])"], [f"stack([{same}, 2.0, {same}])"]])
    assert len(text) < 800
    assert "float32[4], 1.0, float32[4]" in text
    assert "float32[4], 2.0, float32[4]" in text
    assert text.count("stack(...") == 2


def test_what_was_synchronized_with_no_meeting_is_compared_with_nobody(parts: Parts) -> None:
    weights = allocate(parts, 128)

    def run() -> object:
        weights[64:128].mul_(2.0)
        parts.streams.synchronize()
        return weights.neg()

    assert program_of(parts, run) == program_of(parts, weights.neg)


def test_what_was_synchronized_after_a_meeting_is_compared(accelerator: SimAccelerator) -> None:
    weights = accelerator.memory.empty((128,), torch.float32, tag="weights")
    accelerator.streams.boundary()
    weights[64:128].mul_(2.0)
    accelerator.collectives.all_reduce(weights, accelerator.collectives.world).wait()
    accelerator.streams.synchronize()
    weights.neg_()
    accelerator.streams.boundary()
    program = accelerator._conductor.program
    assert program is not None
    assert len(program.last) == 3
