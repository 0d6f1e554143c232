"""What a device that compiles would see of a step: its operations in order, as one program after another.

[Note: what belongs to a program]
Host and device share one memory here, so it is decided by storage. Device memory is an allocation of the device, what
kernels, collectives and copies are given, whatever an operation on device memory makes or writes, and a parameter that
such an operation reads. An operation belongs to the program if it touches device memory; what torch makes from nothing
(`torch.full`, random numbers, batches) is an input, of which a program knows shape and dtype.

A view is no operation: an operand is told by the part of its memory that it is. `%3` is the third piece of memory that
the program uses, so two programs that read different results of the same shape are different ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from windlass.accelerator.counters import ProgramCounts
from windlass.backends.sim.storages import address_of, extent

_NOT_COMPILED: Final = ("device", "generator", "layout", "non_blocking", "pin_memory")  # arguments
_SWEEP_AT: Final = 4096


@dataclass(frozen=True, eq=False, slots=True)
class _Piece:
    """One storage that is known to be the device's, or not to be."""

    on_device: bool
    label: str
    origin: int  # bytes: where in its storage it begins
    reference: StorageWeakRef


class Program:
    """The operations since the last boundary. All methods are for the host's thread."""

    def __init__(self) -> None:
        self.last: tuple[str, ...] = ()
        """The operations between the last two boundaries."""
        self._operations: list[str] = []
        self._begin = 0  # where among them the program that is not yet compiled begins
        self._apart = 0  # where the operations since the last synchronize begin
        self._meets = False  # whether ranks have met since then
        self._numbers: dict[_Piece, int] = {}  # in the order of first use, since then
        self._in_or_after_backward = False
        self._pieces: dict[int, _Piece] = {}  # by the address of the storage
        self._sweep_at = _SWEEP_AT
        self._compiled: set[bytes] = set()
        self._executed = 0
        self._pauses = 0

    @property
    def counts(self) -> ProgramCounts:
        return ProgramCounts(len(self._compiled), self._executed)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The operations of this block belong to no program, and what they make lies on the host."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    # -- memory --------------------------------------------------------------------------------------------------

    def enter(self, tensor: Tensor, label: str, *, on_device: bool = True) -> None:
        """The tensor is an allocation: messages call it `label`, and offsets count from its start."""
        self._know(tensor, on_device, label, extent(tensor)[0])

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """The tensors lie on the device from now on, unless they are allocations elsewhere."""
        for tensor in tensors:
            if address_of(tensor) and self._find(tensor) is None:
                self._know(tensor, True, "", 0)

    # -- operations ----------------------------------------------------------------------------------------------

    def operation(
        self,
        what: object,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],  # also those that it reads besides
        made: Sequence[Tensor],
        is_host_read: bool = False,
    ) -> None:
        """An operation of torch; it belongs to the program if it touches device memory."""
        if self._pauses or not any(self._is_on_device(tensor) for tensor in (*reads, *writes)):
            return
        self.adopt(tensor for tensor in reads if isinstance(tensor, nn.Parameter))
        self.adopt(writes)
        named = {name: value for name, value in kwargs.items() if name not in _NOT_COMPILED}
        self._add(f"{what}({self._tell_all(args, named)})")
        self.produced(made)
        if is_host_read:
            self._cut()

    def command(
        self, what: object, given: Mapping[str, Any], adopted: Iterable[Tensor], *, meets: bool = False
    ) -> None:
        """A kernel, a collective or a copy: always of the device, and so are the tensors that it adopts. `meets`: the
        ranks meet in it."""
        self._meets = self._meets or meets
        self.adopt(adopted)
        self._add(f"{what}({self._tell_all((), given)})")

    def produced(self, tensors: Iterable[Tensor]) -> None:
        """The operation or kernel that was recorded last has made the tensors, or returned what it was given."""
        for tensor in tensors:
            self.adopt((tensor,))
            piece = self._find(tensor)
            if piece is not None:
                self._number(piece)

    def follow(self, model: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        """Memory was made after the model of tensors, and holds nothing yet."""
        if not self._pauses and any(self._is_on_device(tensor) for tensor in model):
            self.adopt(made)

    def read(self, tensor: Tensor) -> None:
        """The step reads the tensor on the host: after a backward has begun, that cuts the program in two."""
        self._add(f"read_host({self._tell(tensor)})")
        self._cut()

    def synchronized(self) -> None:
        """The host waits for all there is. Up to here it was a program of its own, which only has to be that of the
        other ranks if they met in it."""
        self._execute()
        if not self._meets:
            del self._operations[self._apart :]
        self._apart = self._begin = len(self._operations)
        self._meets = False

    def end(self) -> None:
        """The boundary: what was recorded is the last program now, and the next one begins."""
        self._execute()
        self._apart = 0
        self._meets = False
        self.last = tuple(self._operations)
        self._operations.clear()
        self._begin = 0
        self._in_or_after_backward = False

    # -- inside --------------------------------------------------------------------------------------------------

    def _add(self, text: str) -> None:
        self._operations.append(text)
        if not self._in_or_after_backward:
            self._in_or_after_backward = bool(torch._C._current_graph_task_id() != -1)

    def _cut(self) -> None:
        if self._in_or_after_backward:
            self._execute()

    def _execute(self) -> None:
        operations = self._operations[self._begin :]
        if operations:
            self._compiled.add(digest(operations))
            self._executed += 1
        self._begin = len(self._operations)
        self._numbers.clear()

    def _find(self, tensor: Tensor) -> _Piece | None:
        address = address_of(tensor)
        piece = self._pieces.get(address)
        if piece is not None and piece.reference.expired():
            del self._pieces[address]
            return None
        return piece

    def _know(self, tensor: Tensor, on_device: bool, label: str, origin: int) -> None:
        if len(self._pieces) >= self._sweep_at:
            self._pieces = {at: piece for at, piece in self._pieces.items() if not piece.reference.expired()}
            self._sweep_at = 2 * len(self._pieces) + _SWEEP_AT
        reference = StorageWeakRef(tensor.untyped_storage())
        self._pieces[address_of(tensor)] = _Piece(on_device, label, origin, reference)

    def _number(self, piece: _Piece) -> int:
        return self._numbers.setdefault(piece, len(self._numbers) + 1)

    def _is_on_device(self, tensor: Tensor) -> bool:
        piece = self._find(tensor)
        return piece is not None and piece.on_device

    def _tell_all(self, args: Iterable[Any], named: Mapping[str, Any]) -> str:
        told = [self._tell(value) for value in args]
        told += [f"{name}={self._tell(value)}" for name, value in named.items() if value is not None]
        return ", ".join(told)

    def _tell(self, value: Any) -> str:
        """An argument as far as a program knows it: of a tensor everything but its values."""
        if isinstance(value, Tensor):
            return self._tell_tensor(value)
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._tell, value))}]"
        if isinstance(value, torch.Generator):
            return "generator"
        return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else repr(value)

    def _tell_tensor(self, tensor: Tensor) -> str:
        dtype, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
        piece = self._find(tensor)
        if piece is None or not piece.on_device:
            return f"{dtype}{shape}"
        number = self._number(piece)
        start = (extent(tensor)[0] - piece.origin) // tensor.element_size()
        name = repr(piece.label) if piece.label else ""
        if piece.label and len(shape) == 1 and tensor.is_contiguous():
            return f"{name}[{start}:{start + shape[0]}] {dtype} %{number}"
        place = f" from {start}" if start else ""
        strides = "" if tensor.is_contiguous() else f" strides {list(tensor.stride())}"
        return f"{name} {dtype}{shape}{place}{strides} %{number}".lstrip()


def digest(operations: Iterable[str]) -> bytes:
    """16 bytes that stand for these operations in this order."""
    return hashlib.blake2b("\n".join(operations).encode(), digest_size=16).digest()
