"""Issuing functions of tensors: as they are, or captured once and replayed, as the plan says.

[Note: what may be captured] A captured function is replayed without the host: what changes from step to step must be
values in tensors that stay where they are, and what does not is part of the function. So numbers of the host, and
vectors that come from elsewhere in every step, are copied into tensors that are kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator, TensorFunction

_REMEMBERED = 16  # functions; steps that never look alike must not pile up recordings

Structure = TypeVar("Structure", bound=Hashable)


class Issuer:
    """Runs the functions of one executor, and keeps the tensors that hold what changes."""

    def __init__(self, accelerator: Accelerator, *, captures: bool) -> None:
        self.accelerator = accelerator
        self._captures = captures
        self._kept: dict[tuple[str, torch.Size, torch.dtype], Tensor] = {}
        self._functions: dict[tuple[str, Hashable], TensorFunction] = {}  # the last used is the last one

    def keep(self, name: str, value: Tensor) -> Tensor:
        """The value on the device; where functions are captured, in the tensor that had this name and shape before."""
        if not self._captures:
            return self.accelerator.send(value)
        key = (name, value.shape, value.dtype)
        if key not in self._kept:
            self._kept[key] = torch.empty(value.shape, dtype=value.dtype, device=self.accelerator.device)
        return self._kept[key].copy_(self.accelerator.send(value))

    def run(
        self,
        name: str,
        function: Callable[[Structure, Sequence[Tensor]], Sequence[Tensor]],
        structure: Structure,
        tensors: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        """`function(structure, tensors)`. Where functions are captured, results are valid until the next call of the
        same name, and the function may be replayed when name and structure are those of an earlier call."""
        if not self._captures:
            return function(structure, tensors)
        key = (name, structure)
        captured = self._functions.pop(key, None)
        if captured is None:
            captured = self.accelerator.capture(partial(function, structure))
        self._functions[key] = captured
        if len(self._functions) > _REMEMBERED:
            del self._functions[next(iter(self._functions))]
        return captured(tensors)

    def close(self) -> None:
        """Forget what was captured: a recording holds memory on the device, which no facet accounts for."""
        self._functions.clear()
        self._kept.clear()
