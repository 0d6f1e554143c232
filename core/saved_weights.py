"""What autograd saves of gathered weights: their names and how they were looked at, not their bytes.

[Note: saved weights]
Where the accelerator has no views, a unit is gathered into memory of its own for each use, and what autograd saved in
forward would keep that memory alive until backward: stage 3 would save nothing, and gather again for nobody. So while
a module that uses gathered weights runs, saved-tensor hooks stand in: of a weight, of a view of one, and of a trained
weight cast for autocast they keep the parameter's name and the views, and in backward they look at the weights that
have been gathered again. Everything else is kept as autograd keeps it, with its check for writes in place; so is the
cast of a frozen weight, which nothing tells from other tensors.

How a weight was looked at is kept as the same views of a tensor without memory, and gone through again operation by
operation: strides and offsets say nothing on a device that has no layouts.

Hooks are a stack, of which autograd asks the top one only. Under somebody else's (activation checkpointing, saving on
the host) these stay away: what autograd saves is theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _force_original_view_tracking
from torch.autograd.graph import saved_tensors_hooks

from windlass.core.state import STALE_WEIGHTS


@dataclass(frozen=True)
class _Weight:
    """A gathered weight as autograd saved it."""

    name: str  # of the parameter
    generation: int  # of the weights
    cast: torch.dtype | None  # what it was cast to before it was looked at
    looked_at: Tensor | None  # the view of it, without memory; None: the whole of it, as it is


@dataclass(frozen=True)
class _Kept:
    """Any other tensor, and how often it had been written to."""

    tensor: Tensor
    version: int


class SavedWeights:
    """Saved-tensor hooks for the forward of modules that use gathered weights."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        versions: Mapping[str, int],
        weights_of: Callable[[str], Tensor],
        *,
        wanted: bool = True,
    ) -> None:
        """`versions`: of the parameters whose weights are here, their version counters when those were put there.
        `weights_of` gathers a parameter's weights if they are not here, and returns them as they are bound. Where they
        are not `wanted` the hooks are never put up."""
        self._wanted = wanted
        self._parameters = parameters
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._versions = versions
        self._weights_of = weights_of
        self._generation = 0
        self._bare: dict[tuple[str, torch.dtype], Tensor] = {}  # of whole weights, without memory
        self._hooks = saved_tensors_hooks(self._pack, self._unpack)

    # -- when --------------------------------------------------------------------------------------------------

    def begin(self) -> bool:
        """Stand in from here on, on this thread, unless somebody's hooks do. True if an `end` must follow."""
        if not self._wanted or _top() is not None or not _are_allowed():
            return False
        self._hooks.__enter__()
        return True

    def end(self) -> None:
        """The module is done, however it ended."""
        if self._is_active():
            self._hooks.__exit__()

    def reset(self) -> None:
        """A pass was broken off where no module could say `end`."""
        while self._is_active():
            self._hooks.__exit__()

    def weights_changed(self) -> None:
        """What was saved so far cannot be looked at again."""
        self._generation += 1

    def _is_active(self) -> bool:
        top = _top()
        return top is not None and top[0] is self._hooks.pack_hook

    # -- what --------------------------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> _Weight | _Kept:
        return self._recognise(tensor) or _Kept(tensor.detach(), tensor._version)  # the tensor itself would be a cycle

    def _unpack(self, saved: _Weight | _Kept) -> Tensor:
        if isinstance(saved, _Weight):
            return self._look_again(saved)
        if saved.tensor._version != saved.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {tuple(saved.tensor.shape)} is at version {saved.tensor._version}, expected version "
                f"{saved.version}; write to a clone of it instead"
            )
        return saved.tensor

    def _recognise(self, tensor: Tensor) -> _Weight | None:
        """The tensor as a weight, or None where it is none or cannot be made again from one."""
        whole = tensor if tensor._base is None else tensor._base
        name, cast_to = self._names.get(id(whole)), None
        if name is None:
            name, cast_to = self._name_of_cast(whole), whole.dtype
        if name is None:
            return None
        parameter = self._parameters[name]
        if self._versions.get(name) != parameter._version:  # written to since it was gathered: those bytes are lost
            return None
        if whole is tensor:
            return _Weight(name, self._generation, cast_to, None)
        bare = self._bare.get((name, whole.dtype))
        if bare is None:
            bare = self._bare[name, whole.dtype] = torch.empty(whole.shape, dtype=whole.dtype, device="meta")
        with _force_original_view_tracking(True):  # the operations, not sizes and strides
            looked_at = _replay(tensor, bare)
        return _Weight(name, self._generation, cast_to, looked_at)

    def _name_of_cast(self, whole: Tensor) -> str | None:
        """The parameter of which `whole` is a copy in another dtype and nothing else."""
        node = whole.grad_fn
        if node is None or node.name() != "ToCopyBackward0" or whole._version != 0 or not whole.is_contiguous():
            return None
        parameter = getattr(node.next_functions[0][0], "variable", None)
        return self._names.get(id(parameter)) if parameter is not None and parameter.device == whole.device else None

    def _look_again(self, saved: _Weight) -> Tensor:
        if saved.generation != self._generation:
            raise RuntimeError(STALE_WEIGHTS)
        with torch.no_grad():
            weights = self._weights_of(saved.name)
            if saved.cast is not None:
                weights = weights.to(saved.cast)
            return weights if saved.looked_at is None else _replay(saved.looked_at, weights)


def _top() -> tuple[Callable[[Tensor], object], Callable[[object], Tensor]] | None:
    """The hooks that autograd asks on this thread: (pack, unpack)."""
    return cast(
        "tuple[Callable[[Tensor], object], Callable[[object], Tensor]] | None",
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


def _are_allowed() -> bool:
    """False inside of torch.func's transforms and where somebody forbade hooks."""
    return bool(torch._C._autograd._saved_tensors_hooks_is_enabled())  # type: ignore[attr-defined]


def _replay(view: Tensor, base: Tensor) -> Tensor:
    """The same views of `base` as `view` is of its own."""
    result: Tensor = view._view_func_unsafe(base)
    return result
