"""When the hooks for saved weights are asked, and what they leave to autograd and to others."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from gathered_parameters import Gathered, equal, hooks_are_on, random, some_input


def test_weights_that_have_changed_since_are_refused() -> None:
    parameter, x = nn.Parameter(random(8, 8)), some_input()
    gathered = Gathered(parameter)
    gathered.bring()
    with gathered.forward():
        loss = (x @ parameter).sum()
    gathered.saved.weights_changed()
    with pytest.raises(RuntimeError, match="an optimizer step has changed since the forward pass"):
        loss.backward()


def test_a_write_to_another_saved_tensor_is_noticed_as_without_the_hooks() -> None:
    gathered = Gathered(nn.Parameter(random(8, 8)))
    gathered.bring()
    for hooked in (False, True):
        y = some_input() * 2
        if hooked:
            with gathered.forward():
                loss = y.square().sum()
        else:
            loss = y.square().sum()
        with torch.no_grad():
            y.mul_(2)
        with pytest.raises(RuntimeError, match="has been modified by an inplace operation"):
            loss.backward()


def test_saved_outputs_make_no_cycle() -> None:
    gathered = Gathered(nn.Parameter(random(8, 8)))
    gathered.bring()
    gc.disable()
    try:
        with gathered.forward():
            y = torch.exp(some_input())  # its node saves its output
        memory = StorageWeakRef(y.untyped_storage())
        del y
        assert memory.expired()
    finally:
        gc.enable()


def test_other_hooks_are_asked_where_they_are() -> None:
    """Under somebody's hooks these stay away; inside of these somebody's are asked, and then these again."""
    parameter, x = nn.Parameter(random(8, 8)), some_input()
    want = torch.autograd.grad(((x @ parameter) @ parameter).sum(), [x, parameter])
    gathered = Gathered(parameter)
    gathered.bring()
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        assert not gathered.saved.begin()
        loss = ((x @ parameter) @ parameter).sum()
        gathered.saved.end()
        gathered.saved.reset()
        assert hooks_are_on()
    assert len(seen) == 4
    assert not hooks_are_on()
    assert equal(torch.autograd.grad(loss, [x, parameter]), want)
    with gathered.forward():
        with save_on_cpu():
            y = x @ parameter
        loss = (y @ parameter).sum()
    gathered.take_away()
    assert equal(torch.autograd.grad(loss, [x, parameter]), want)
    assert gathered.fetched == ["p0"]  # the second use only


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside(reentrant: bool) -> None:
    parameter, x = nn.Parameter(random(8, 8)), some_input()

    def block(y: Tensor) -> Tensor:
        with gathered.forward() if torch.is_grad_enabled() and not hooks_are_on() else torch.enable_grad():
            return torch.tanh(y @ parameter) @ parameter.t()

    want = torch.autograd.grad((torch.tanh(x @ parameter) @ parameter.t()).sum(), [x, parameter])
    gathered = Gathered(parameter)
    (memory,) = gathered.bring()
    with gathered.forward():
        y = checkpoint(block, x, use_reentrant=reentrant)
    assert isinstance(y, Tensor)
    gathered.take_away()
    assert memory.expired()
    gathered.bring()
    y.sum().backward()
    assert x.grad is not None
    assert parameter.grad is not None
    assert equal((x.grad, parameter.grad), want)


def test_hooks_are_off_after_an_error_and_after_a_pass_that_was_broken_off() -> None:
    gathered = Gathered(nn.Parameter(random(8, 8)))
    with pytest.raises(ZeroDivisionError), gathered.forward():
        raise ZeroDivisionError
    assert not hooks_are_on()
    with gathered.forward():
        assert not gathered.saved.begin()  # inside of its own: once is enough
    assert not hooks_are_on()
    assert gathered.saved.begin()
    gathered.saved.reset()
    gathered.saved.end()
    assert not hooks_are_on()


def test_where_hooks_are_forbidden_the_tensors_are_saved() -> None:
    gathered = Gathered(nn.Parameter(random(8, 8)))
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert not gathered.saved.begin()
