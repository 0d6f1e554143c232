"""Parameters whose weights come and go, as gathered units do, and tensors to use them with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from windlass.core.saved_weights import SavedWeights


class Gathered:
    """Parameters whose weights come and go, as gathered units do."""

    def __init__(self, *parameters: nn.Parameter) -> None:
        self.parameters = {f"p{index}": parameter for index, parameter in enumerate(parameters)}
        self.shards = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.versions: dict[str, int] = {}
        self.fetched: list[str] = []
        self.saved = SavedWeights(self.parameters, self.versions, self._weights_of)

    def bring(self) -> list[StorageWeakRef]:
        """Bind every parameter to memory of its own; references that tell when it is free."""
        return [self._bind(name) for name in self.parameters]

    def take_away(self) -> None:
        for parameter in self.parameters.values():
            parameter.data = torch.full((), float("nan"), dtype=parameter.dtype).expand(parameter.shape)
        self.versions.clear()

    def _bind(self, name: str) -> StorageWeakRef:
        self.parameters[name].data = self.shards[name].clone()
        self.versions[name] = self.parameters[name]._version
        return StorageWeakRef(self.parameters[name].untyped_storage())

    def _weights_of(self, name: str) -> Tensor:
        self.fetched.append(name)
        self._bind(name)
        return self.parameters[name].detach()

    @contextmanager
    def forward(self) -> Iterator[None]:
        assert self.saved.begin()
        try:
            yield
        finally:
            self.saved.end()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def some_input() -> Tensor:
    return random(2, 6, 8).requires_grad_()


def equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def hooks_are_on() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
