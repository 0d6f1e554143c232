"""Sees the torch operations of a thread, and tells every open device what they read and write."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.flop_counter import flop_registry

from windlass.backends.sim.errors import HostReadRefused
from windlass.backends.sim.storages import address_of

if TYPE_CHECKING:
    from windlass.backends.sim.conductor import Conductor
    from windlass.backends.sim.program import Program

_MUST_NOT_READ_HOST: Final = ("windlass.core", "windlass.accelerator")
_INSIDE: Final = ("torch", "windlass.backends")  # whose frames only carry out what somebody else asked for

# Operations that touch no memory although their schema says that they make or write a tensor.
_NO_ACCESS: Final = frozenset((
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "record_stream",
    "set_",
))  # fmt: skip
# In-place operations that do not read what they write, besides `out=`.
_OVERWRITING: Final = frozenset((
    "copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "exponential_", "bernoulli_", "log_normal_",
    "cauchy_", "geometric_", "eye_", "_foreach_copy_", "_foreach_zero_", "resize_",
))  # fmt: skip
# Operations whose result, or its shape, the host has to know.
_HOST_READS: Final = frozenset((
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere",
    "masked_select", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "_unique", "_unique2",
    "bincount",
))  # fmt: skip


@dataclass(frozen=True)
class _Facts:
    """What an operation does, as its schema says."""

    no_access: bool
    view: bool
    may_copy: bool  # a view, or else a copy
    host_read: bool
    indexes: bool  # by tensors: with a mask among them the host has to count
    written: frozenset[int | str]  # arguments, by position and by name
    overwritten: frozenset[int | str]  # those of them that are not read
    flops: Callable[..., Any] | None


class _OfThread(threading.local):
    watcher: Watcher | None = None
    pauses = 0


_of_thread = _OfThread()
_watching: dict[Conductor, Watcher] = {}
_facts: dict[OpOverload, _Facts] = {}


class Watcher(TorchDispatchMode):
    """One per thread, for all devices that the thread has opened."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.conductors: list[Conductor] = []
        self.programs: list[Program] = []  # of those of them that compile

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # `_hide_from_compiler` does without importing the compiler, which takes seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if not self.conductors or _of_thread.pauses or not isinstance(func, OpOverload):
            return func(*args, **named)
        facts = _facts.get(func) or _describe(func)
        if facts.no_access or (facts.view and not facts.may_copy):
            result = func(*args, **named)
            if facts.no_access and self.programs:
                self._follow(args, result)
            return result
        reads, updates, writes = _sort(facts, args, named)
        if facts.view:
            result = func(*args, **named)
            if isinstance(result, Tensor) and reads and address_of(result) != address_of(reads[0]):
                self._enter(func, reads, (), ())
                self._leave(func, facts, reads, result, args, named)
                self._record(func, reads, (), result, args, named)
            return result
        reads_host = facts.host_read or (facts.indexes and _has_mask(args))
        if reads_host:
            _require_may_read(func)
        self._enter(func, reads, updates, writes)
        result = func(*args, **named)
        self._leave(func, facts, [*reads, *updates, *updates, *writes], result, args, named)
        self._record(func, reads, [*updates, *writes], result, args, named, is_host_read=reads_host)
        return result

    def _enter(
        self, func: OpOverload, reads: Sequence[Tensor], updates: Sequence[Tensor], writes: Sequence[Tensor]
    ) -> None:
        for conductor in self.conductors:
            conductor.operation(func, reads=reads, updates=updates, writes=writes)

    def _record(
        self,
        func: OpOverload,
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        result: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        is_host_read: bool = False,
    ) -> None:
        if not self.programs:
            return
        made: list[Tensor] = []
        _collect(result, made)
        for program in self.programs:
            program.operation(func, args, kwargs, reads=reads, writes=writes, made=made, is_host_read=is_host_read)

    def _follow(self, args: Sequence[Any], result: Any) -> None:
        model: list[Tensor] = []
        made: list[Tensor] = []
        _collect(args, model)
        _collect(result, made)
        for program in self.programs:
            program.follow(model, made)

    def _leave(
        self,
        func: OpOverload,
        facts: _Facts,
        moved: Sequence[Tensor],  # what it has read and written
        result: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> None:
        made: list[Tensor] = []
        if not facts.written:
            _collect(result, made)
        nbytes = sum(one.numel() * one.element_size() for one in (*moved, *made))
        flops = 0.0 if facts.flops is None else float(facts.flops(*args, **kwargs, out_val=result))
        dtype = str(moved[0].dtype).removeprefix("torch.") if moved else "float32"
        for conductor in self.conductors:
            if made:
                conductor.produced(func, made)
            seconds = conductor.clock.operation_seconds(nbytes, flops, dtype)
            conductor.clock.advance(conductor.current_lane, seconds)


def watch(conductor: Conductor) -> None:
    """From now on the conductor sees this thread's torch operations."""
    watcher = _of_thread.watcher
    if watcher is None:
        _hide_from_compiler()
        watcher = _of_thread.watcher = Watcher()
        watcher.__enter__()  # type: ignore[no-untyped-call]
    watcher.conductors.append(conductor)
    if conductor.program is not None:
        watcher.programs.append(conductor.program)
    _watching[conductor] = watcher


def unwatch(conductor: Conductor) -> None:
    """The conductor sees no more. Safe to call twice."""
    watcher = _watching.pop(conductor, None)
    if watcher is None:
        return
    watcher.conductors.remove(conductor)
    if conductor.program is not None:
        watcher.programs.remove(conductor.program)
    # Modes are left in the order in which they were entered; one that lies deeper stays, and sees nothing.
    if not watcher.conductors and _of_thread.watcher is watcher and _get_current_dispatch_mode() is watcher:
        watcher.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        _of_thread.watcher = None


@contextmanager
def unwatched() -> Iterator[None]:
    """The torch operations of this block are the simulation's own: nobody sees them."""
    _of_thread.pauses += 1
    try:
        yield
    finally:
        _of_thread.pauses -= 1


def _hide_from_compiler() -> None:
    """Compiled functions call the watcher as it is: neither it nor what it calls is compiled."""
    code = inspect.unwrap(Watcher.__torch_dispatch__).__code__
    set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))


def _describe(func: OpOverload) -> _Facts:
    schema = func._schema
    name = schema.name.rpartition("::")[2]
    written: set[int | str] = set()
    overwritten: set[int | str] = set()
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written |= {index, argument.name}
            if argument.is_out or name in _OVERWRITING:
                overwritten |= {index, argument.name}
    if name in ("native_batch_norm", "cudnn_batch_norm"):  # their schema does not tell
        written |= {3, 4, "running_mean", "running_var"}
    view = not written and any(one.alias_info is not None for one in schema.returns)
    facts = _Facts(
        # resize_ counts as a view, and gives up the memory that a work may be using.
        no_access=name in _NO_ACCESS or (torch.Tag.inplace_view in func.tags and name != "resize_"),
        view=view,
        may_copy=view and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
        host_read=name in _HOST_READS or (name == "where" and len(schema.arguments) == 1),
        indexes=name in ("index", "index_put", "index_put_", "_index_put_impl_"),
        written=frozenset(written),
        overwritten=frozenset(overwritten),
        flops=flop_registry.get(func.overloadpacket),
    )
    _facts[func] = facts
    return facts


def _sort(
    facts: _Facts, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The tensors that an operation reads, those that it reads and writes, and those that it only writes."""
    reads: list[Tensor] = []
    updates: list[Tensor] = []
    writes: list[Tensor] = []
    for key, value in (*enumerate(args), *kwargs.items()):
        into = reads if key not in facts.written else writes if key in facts.overwritten else updates
        _collect(value, into)
    return reads, updates, writes


def _collect(value: Any, into: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        into.append(value)
    elif isinstance(value, list | tuple):
        for one in value:
            _collect(one, into)


def _has_mask(args: Sequence[Any]) -> bool:
    found: list[Tensor] = []
    _collect(args[1:2], found)
    return any(one.dtype in (torch.bool, torch.uint8) for one in found)


def _require_may_read(func: OpOverload) -> None:
    """Raise HostReadRefused if it is the core that asks; whoever uses it may read as they like."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and _belongs(frame, _INSIDE):
        frame = frame.f_back
    if frame is not None and _belongs(frame, _MUST_NOT_READ_HOST):
        raise HostReadRefused(
            f"{frame.f_globals['__name__']}, line {frame.f_lineno}, reads the device on the host by {func}; keep the "
            "value on the device, or add it to the one vector that a step reads by read_host"
        )


def _belongs(frame: FrameType, packages: Sequence[str]) -> bool:
    module = str(frame.f_globals.get("__name__", ""))
    return any(module == package or module.startswith(f"{package}.") for package in packages)
