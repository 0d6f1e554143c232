"""Weights saved by name: free between forward and backward, and gradients to the bit as plain autograd's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from gathered_parameters import Gathered, equal, random, some_input

# How a weight is used, and its shape; x is [2, 6, 8].
USES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "linear": (F.linear, (8, 8)),
    "linear of rows": (lambda x, w: F.linear(x[0], w), (5, 8)),
    "linear with a bias": (lambda x, w: F.linear(x, w[:8], w[8]), (9, 8)),
    "matmul": (lambda x, w: x @ w, (8, 8)),
    "matmul with the transpose": (lambda x, w: x @ w.T, (5, 8)),
    "batched matmul": (lambda x, w: torch.bmm(x, w.expand(2, 8, 4)), (8, 4)),
    "one of three in one matrix": (lambda x, w: F.linear(x, w.chunk(3)[2]), (12, 8)),
    "columns of a matrix": (lambda x, w: F.linear(x[..., 1:4], w[:, 1:4]), (5, 8)),
    "heads of a matrix": (lambda x, w: torch.einsum("bti,hdi->bhtd", x, w.view(2, 4, 8)), (8, 8)),
    "every second row": (lambda x, w: x @ w[::2].mT, (8, 8)),
    "a row": (lambda x, w: x * w[1], (3, 8)),
    "a diagonal": (lambda x, w: x * w.diagonal(), (8, 8)),
    "a vector over rows": (lambda x, w: x * w.expand(6, 8), (8,)),
    "strided": (lambda x, w: x * w.as_strided((8,), (2,), 1), (4, 4)),
    "layer norm": (lambda x, w: F.layer_norm(x, (8,), w[0], w[1]), (2, 8)),
    "convolution": (lambda x, w: F.conv1d(x, w), (4, 6, 3)),
    "convolution with reordered weights": (lambda x, w: F.conv1d(x, w.permute(2, 1, 0)), (3, 6, 4)),
    "embedding and its transpose": (lambda x, w: x @ w.t() + F.embedding(torch.tensor([0, 2]), w).sum(), (7, 8)),
}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", USES)
def test_a_weight_is_free_until_backward_and_gradients_are_the_same_bits(name: str, trained: bool) -> None:
    use, shape = USES[name]
    parameter, x = nn.Parameter(random(*shape), requires_grad=trained), some_input()
    inputs = [x, parameter] if trained else [x]
    want = torch.autograd.grad(use(x, parameter).square().sum(), inputs)
    gathered = Gathered(parameter)
    (memory,) = gathered.bring()
    with gathered.forward():
        loss = use(x, parameter).square().sum()
    gathered.take_away()
    assert memory.expired()
    got = torch.autograd.grad(loss, inputs)
    assert set(gathered.fetched) == {"p0"}
    assert equal(got, want)


def test_without_the_hooks_the_memory_stays() -> None:
    """What the test above would see if nothing stood in."""
    parameter, x = nn.Parameter(random(8, 8)), some_input()
    gathered = Gathered(parameter)
    (memory,) = gathered.bring()
    loss = F.linear(x, parameter).sum()
    gathered.take_away()
    assert not memory.expired()
    loss.backward()


def test_a_weight_cast_to_a_lower_precision_is_cast_again() -> None:
    parameter, x = nn.Parameter(random(5, 8)), some_input()
    want = torch.autograd.grad(F.linear(x.bfloat16(), parameter.bfloat16()).square().sum(), [x, parameter])
    gathered = Gathered(parameter)
    gathered.bring()
    with gathered.forward():
        copy = parameter.bfloat16()
        memory = StorageWeakRef(copy.untyped_storage())
        loss = F.linear(x.bfloat16(), copy).square().sum()
        del copy
    gathered.take_away()
    assert memory.expired()
    assert equal(torch.autograd.grad(loss, [x, parameter]), want)
    assert gathered.fetched == ["p0"]


def test_autocast_leaves_no_copies_of_weights() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), some_input()
    parameters = list(model.parameters())

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            result: Tensor = model(x).float().square().sum()
        return result

    want = torch.autograd.grad(run(), parameters)
    gathered = Gathered(*parameters)
    gathered.bring()
    with gathered.forward():
        loss = run()
    gathered.take_away()
    assert equal(torch.autograd.grad(loss, parameters), want)
    assert gathered.fetched == ["p2", "p0"]  # the matrices, last first; biases are not needed


def test_changed_copies_are_saved_as_they_are() -> None:
    """A copy that was written to, or made of a part, is not the weight any more."""
    parameter, x = nn.Parameter(random(8, 8)), some_input()

    def run() -> Tensor:
        changed = parameter.bfloat16()
        changed.mul_(2)
        quietly = parameter.bfloat16()
        with torch.no_grad():
            quietly.mul_(3)
        return ((x.bfloat16() @ changed) @ quietly @ parameter[::2].bfloat16().mT).float().square().sum()

    want = torch.autograd.grad(run(), [x, parameter])
    gathered = Gathered(parameter)
    gathered.bring()
    with gathered.forward():
        loss = run()
    gathered.take_away()
    assert equal(torch.autograd.grad(loss, [x, parameter]), want)
    assert not gathered.fetched


def test_weights_written_to_in_forward_are_saved_as_they_are() -> None:
    """Fetched again they would be those before the write."""
    parameter, x = nn.Parameter(random(8, 8)), some_input()
    want = torch.autograd.grad((x @ (2 * parameter.detach())).square().sum(), x)
    gathered = Gathered(parameter)
    gathered.bring()
    with gathered.forward():
        with torch.no_grad():
            parameter.mul_(2)
        loss = (x @ parameter).square().sum()
    gathered.take_away()
    assert equal(torch.autograd.grad(loss, x), want)
    assert not gathered.fetched


def test_a_graph_is_gone_through_twice_and_differentiated_twice() -> None:
    parameter, x = nn.Parameter(random(8, 8)), some_input()

    def slope(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, x, create_graph=True)[0].square().sum()

    plain = torch.tanh(x @ parameter).sum()
    want = [*torch.autograd.grad(plain, [x, parameter], retain_graph=True)]
    want += torch.autograd.grad(slope(plain), [x, parameter])
    gathered = Gathered(parameter)
    gathered.bring()
    with gathered.forward():
        loss = torch.tanh(x @ parameter).sum()
    gathered.take_away()
    got = [*torch.autograd.grad(loss, [x, parameter], retain_graph=True)]
    with gathered.forward():
        second = slope(loss)
    gathered.take_away()
    got += torch.autograd.grad(second, [x, parameter])
    assert equal(tuple(got), tuple(want))
    assert len(gathered.fetched) >= 3
