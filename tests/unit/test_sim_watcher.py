"""Every torch operation of the host is held against what is under way on the lanes: each mistake next to its cure."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from sim_parts import Parts, open_parts
from windlass.backends.sim.conductor import SimWork
from windlass.backends.sim.errors import HostReadRefused, OrderViolation
from windlass.backends.sim.watcher import unwatch, unwatched, watch


class Flight:
    """One all-gather on lane gather, under way until `land`."""

    def __init__(self, parts: Parts, source: Tensor, target: Tensor, *, told: bool = True) -> None:
        self.gate = threading.Event()
        event = parts.streams.record()
        with parts.streams.lane("gather"):
            if told:
                parts.streams.wait(event)
            self.work: SimWork = parts.collective([source], [target], self.gate)

    def land(self) -> None:
        self.gate.set()
        self.work.wait()


@pytest.fixture
def parts() -> Iterator[Parts]:
    with open_parts() as opened:
        yield opened


@pytest.fixture(params=["allocation", "no allocation"])
def make(parts: Parts, request: pytest.FixtureRequest) -> Callable[[int], Tensor]:
    """Makes a tensor of so many ones, of the memory facet or of torch."""
    if request.param == "allocation":
        return lambda size: parts.memory.empty((size,), torch.float32, tag="weights").fill_(1.0)
    return lambda size: torch.ones(size)


def test_an_output_may_be_read_after_the_wait_and_not_before(parts: Parts, make: Callable[[int], Tensor]) -> None:
    source, target = make(4), make(4).zero_()
    flight = Flight(parts, source, target)
    reads: list[Callable[[], object]] = [
        target.sum,
        target.clone,
        lambda: target.view(2, 2) @ torch.ones(2, 2),
        lambda: target[2:] + 1,
    ]
    for read in reads:
        with pytest.raises(
            OrderViolation, match="which all_gather 'weights' on lane gather writes, and nothing orders"
        ):
            read()
    flight.land()
    assert target.sum() == 4


def test_an_input_may_be_written_after_the_wait_and_not_before(parts: Parts, make: Callable[[int], Tensor]) -> None:
    source, target = make(4), make(4).zero_()
    flight = Flight(parts, source, target)
    writes: list[Callable[[], object]] = [
        source.zero_,
        lambda: source.add_(1),
        lambda: torch.add(source, 1, out=source),
        lambda: torch._foreach_add_([torch.ones(1), source], 1.0),
        lambda: source[1:].copy_(torch.ones(3)),
        lambda: source.__setitem__(0, 5.0),
        lambda: source.resize_(1000),  # elsewhere, perhaps, and what is read here is given up
    ]
    for write in writes:
        with pytest.raises(OrderViolation, match="which all_gather 'weights' on lane gather reads, and nothing orders"):
            write()
    assert source.sum() == 4  # reading is no race, and nothing has been written
    flight.land()
    source.zero_()


def test_two_works_on_the_same_bytes_need_a_wait_between_them(parts: Parts, make: Callable[[int], Tensor]) -> None:
    source, target = make(4), make(8)
    flight = Flight(parts, source, target[:4])
    beside = Flight(parts, source, target[4:])  # other bytes
    with pytest.raises(OrderViolation, match=r"writes bytes 8 to 16 of .* call wait\(\) of that work on lane gather"):
        Flight(parts, source[:2], target[2:4])
    flight.land()
    beside.land()
    Flight(parts, source[:2], target[2:4]).land()


def test_a_lane_has_to_wait_for_what_was_computed(parts: Parts, make: Callable[[int], Tensor]) -> None:
    source, target = make(4), make(4)
    source.mul_(2.0)
    with pytest.raises(OrderViolation, match="record an event on lane compute after it and wait for that on lane gat"):
        Flight(parts, source, target, told=False)
    Flight(parts, source, target).land()
    assert target.sum() == 8


def test_an_event_that_was_recorded_too_early_does_not_help(parts: Parts, make: Callable[[int], Tensor]) -> None:
    source, target = make(4), make(4)
    event = parts.streams.record()
    source.mul_(2.0)
    with parts.streams.lane("gather"):
        parts.streams.wait(event)
        with pytest.raises(OrderViolation, match=r"which aten\.mul_\.Tensor on lane compute writes"):
            parts.collective([source], [target])
        parts.streams.wait(_record_on_compute(parts))
        work = parts.collective([source], [target])
    work.wait()


def _record_on_compute(parts: Parts) -> Any:
    with parts.streams.lane("compute"):
        return parts.streams.record()


def test_waiting_on_another_lane_does_not_order_the_compute_lane(parts: Parts) -> None:
    source, target = torch.ones(4), torch.zeros(4)
    flight = Flight(parts, source, target)
    with parts.streams.lane("reduce"):
        flight.work.wait()
        event = parts.streams.record()
    with pytest.raises(OrderViolation, match="was waited for on lane reduce only"):
        target.sum()
    flight.gate.set()
    event.wait()
    assert target.sum() == 4


def test_an_operation_in_another_lane_is_ordered_by_events(parts: Parts) -> None:
    tensor = torch.ones(4)
    event = parts.streams.record()
    with parts.streams.lane("reduce"):
        with pytest.raises(OrderViolation, match="record an event on lane compute after it"):
            tensor.sum()
        parts.streams.wait(event)
        doubled = tensor * 2
        tensor.add_(1)
        done = parts.streams.record()
    uses: list[Callable[[], object]] = [doubled.sum, lambda: tensor.mul_(2), tensor.sum]
    for use in uses:
        with pytest.raises(OrderViolation, match="record an event on lane reduce after it"):
            use()
    parts.streams.wait(done)
    assert doubled.sum() == 8
    assert tensor.sum() == 8


def test_views_are_no_accesses(parts: Parts, make: Callable[[int], Tensor]) -> None:
    target = make(16)
    flight = Flight(parts, torch.ones(16), target)
    views = (
        target.view(4, 4), target[3:7], target.detach(), target.view(4, 4).t(), target.as_strided((2,), (3,)),
        target.view(torch.int32), target.data, target.expand(2, 16), target.unfold(0, 2, 1), target.reshape(2, 8),
    )  # fmt: skip
    assert all(view.untyped_storage().data_ptr() == target.untyped_storage().data_ptr() for view in views)
    assert target.chunk(4)[1].shape == (4,)
    flight.land()


def test_a_reshape_that_copies_is_an_access_also_in_inference_mode(parts: Parts) -> None:
    with torch.inference_mode():
        target = torch.zeros(2, 3)
        flight = Flight(parts, torch.ones(2, 3), target)
        assert target.reshape(6).shape == (6,)
        copies: list[Callable[[], object]] = [
            lambda: target.t().reshape(6),
            target.t().contiguous,
            lambda: target.to(torch.float16),
        ]
        for copy in copies:
            with pytest.raises(OrderViolation, match="which all_gather 'weights' on lane gather writes"):
                copy()
        flight.land()
        assert target.t().reshape(6).sum() == 6


def test_a_strided_tensor_counts_as_everything_between_its_ends(parts: Parts, make: Callable[[int], Tensor]) -> None:
    target = make(16)
    flight = Flight(parts, torch.ones(4), target.view(4, 4)[:, 1])
    with pytest.raises(OrderViolation, match="reads bytes 4 to 56"):
        target.sum()
    with pytest.raises(OrderViolation, match="reads bytes 8 to 56"):
        target.view(4, 4)[:, 2].sum()
    assert target[:1].sum() == 1
    assert target[14:].sum() == 2
    flight.land()


def test_backward_is_watched(parts: Parts) -> None:
    weight = torch.ones(4, requires_grad=True)
    loss = (weight * weight).sum()
    flight = Flight(parts, torch.ones(4), weight.detach())
    with pytest.raises(OrderViolation, match=r"aten\.mul\.Tensor on lane compute reads"):
        loss.backward()
    flight.land()

    frozen = torch.ones(4)
    inner = torch.ones(4, requires_grad=True)
    outer = checkpoint(lambda x: (x * frozen).exp(), inner, use_reentrant=False).sum()
    flight = Flight(parts, torch.ones(4), frozen)
    with pytest.raises(OrderViolation):
        outer.backward()
    flight.land()


def test_a_gradient_that_is_being_reduced_may_not_be_added_to(parts: Parts) -> None:
    weight = torch.ones(4, requires_grad=True)
    (weight * 2).sum().backward()
    assert weight.grad is not None
    flight = Flight(parts, weight.grad, torch.empty(4))
    loss = (weight * 3).sum()
    with pytest.raises(OrderViolation, match=r"aten\.add_\.Tensor on lane compute writes"):
        loss.backward()
    flight.land()


def test_what_a_kernel_has_consumed_is_read_once_it_is_rewritten(parts: Parts, make: Callable[[int], Tensor]) -> None:
    given = make(8)
    parts.conductor.operation("kernel 'adamw'", updates=[given[:4]])
    parts.conductor.consume([given[:4]], "kernel 'adamw'")
    with pytest.raises(OrderViolation, match=r"reads bytes 0 to 16 of .* which kernel 'adamw' has consumed; use what"):
        given.sum()
    with pytest.raises(OrderViolation, match="consumed"):
        given[:2].add_(1)  # reads too
    assert given[4:].sum() == 4
    given[:2].copy_(torch.ones(2))
    with pytest.raises(OrderViolation, match="reads bytes 8 to 16"):
        given.sum()
    with unwatched():
        assert given[2:4].isnan().all()
    torch.mul(torch.ones(2), 3.0, out=given[2:4])
    assert given.sum() == 1 + 1 + 3 + 3 + 4


def test_the_simulation_does_not_watch_itself(parts: Parts) -> None:
    target = torch.zeros(4)
    flight = Flight(parts, torch.ones(4), target)
    with unwatched():
        target.sum()
    with pytest.raises(OrderViolation):
        target.sum()
    flight.land()


def test_memory_of_a_tensor_that_is_no_more_may_be_used_again(parts: Parts) -> None:
    for _ in range(200):
        source, target = torch.ones(64), torch.zeros(64)
        Flight(parts, source, target).gate.set()
        del source, target  # nobody will ever wait, and nobody holds it
        assert torch.ones(64).add_(1).sum() == 128
    parts.streams.synchronize()


def test_tensors_without_memory_are_let_pass(parts: Parts) -> None:
    assert (torch.ones(3, device="meta") + 1).shape == (3,)
    assert torch.eye(3).to_sparse().sum() == 3
    assert torch.vmap(lambda row: row.sum())(torch.ones(2, 3)).tolist() == [3.0, 3.0]


# -- host reads --------------------------------------------------------------------------------------------------


def inside(module: str, function: FunctionType) -> Callable[..., Any]:
    """The function, as if it stood in `module`."""
    return FunctionType(function.__code__, {**function.__globals__, "__name__": module}, closure=function.__closure__)


READS: list[Callable[[Tensor], object]] = [
    lambda tensor: tensor[0].item(),
    lambda tensor: bool(tensor[0] > 0),
    lambda tensor: float(tensor[0]),
    lambda tensor: torch.equal(tensor, tensor),
    lambda tensor: tensor.nonzero(),
    lambda tensor: torch.allclose(tensor, tensor),
    lambda tensor: tensor[tensor > 0],
    lambda tensor: tensor.index_put_((tensor > 0,), torch.ones(3)),
    lambda tensor: tensor.unique(),
    lambda tensor: torch.where(tensor > 0),
]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("inference", [False, True])
def test_the_core_does_not_read_the_host(parts: Parts, read: FunctionType, inference: bool) -> None:
    tensor = torch.ones(3)
    with torch.inference_mode(inference):
        for module in ("windlass.core.executor", "windlass.core", "windlass.accelerator.reference"):
            with pytest.raises(HostReadRefused, match=rf"{module}, line \d+, reads the device on the host by aten"):
                inside(module, read)(tensor)
        for module in ("user", "windlass.engine", "windlass.corecontrib", "windlass.conformance.training"):
            inside(module, read)(tensor)


def test_what_the_core_calls_counts_as_its_own_only_inside_torch_and_the_backends(parts: Parts) -> None:
    tensor = torch.ones(3)

    def read() -> object:
        return tensor[0].item()

    user: Any = inside("user.model", read)  # type: ignore[arg-type]
    backend: Any = inside("windlass.backends.cpu.memory", read)  # type: ignore[arg-type]

    def call(function: Callable[[], object]) -> object:
        return function()

    core = inside("windlass.core.executor", call)  # type: ignore[arg-type]
    assert core(user) == 1
    with pytest.raises(HostReadRefused, match=r"windlass\.core\.executor"):
        core(backend)


# -- coming and going --------------------------------------------------------------------------------------------


def test_one_mode_serves_all_devices_of_the_thread_and_leaves_with_the_last() -> None:
    assert _get_current_dispatch_mode() is None
    with open_parts() as one:
        mode = _get_current_dispatch_mode()
        with open_parts() as other:
            assert _get_current_dispatch_mode() is mode
            for parts in (one, other):
                tensor = parts.memory.empty((4,), torch.float32)
                parts.memory.release(tensor)
                with pytest.raises(OrderViolation):
                    tensor.zero_()
        assert _get_current_dispatch_mode() is mode
    assert _get_current_dispatch_mode() is None


def test_devices_may_be_closed_in_any_order_and_inside_other_modes() -> None:
    class Counting(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Counting.seen += 1
            return func(*args, **(kwargs or {}))

    with open_parts() as one:
        with Counting():  # type: ignore[no-untyped-call]
            unwatch(one.conductor)  # below another mode: it stays, and sees nothing
            unwatch(one.conductor)
            tensor = one.memory.empty((4,), torch.float32)
            one.memory.release(tensor)
            tensor.zero_()
        assert Counting.seen
        watch(one.conductor)
        with pytest.raises(OrderViolation):
            tensor.zero_()
    assert _get_current_dispatch_mode() is None


def test_other_threads_are_not_watched(parts: Parts) -> None:
    target = torch.zeros(4)
    flight = Flight(parts, torch.ones(4), target)
    errors: list[BaseException] = []

    def read() -> None:
        try:
            target.sum()
        except OrderViolation as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert errors == []
    flight.land()


def test_compiled_functions_are_watched_and_the_watcher_is_not_compiled(parts: Parts) -> None:
    graphs: list[object] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    function = torch.compile(lambda tensor: tensor * 2 + 1, backend=keep)
    for size in range(2, 6):
        assert function(torch.ones(size)).sum() == 3 * size
    target = torch.zeros(4)
    flight = Flight(parts, torch.ones(4), target)
    with pytest.raises(OrderViolation):
        function(target)
    flight.land()
    assert function(target).sum() == 12
    assert graphs == []  # in a mode nothing is
