"""Functions that are recorded on the device once and replayed afterwards, for devices whose runtime can do that.

What a runtime records is bound to addresses. So a recording belongs to the addresses and layouts of the tensors it was
made with, and a call with other tensors makes another. Nothing of the caller's is kept alive for it: results that lie
in an argument are taken from the argument of the call at hand.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.accelerator.interface import TensorFunction

KEPT: Final = 8
"""Recordings of one function that are kept; each has memory of its own for what the function allocates."""

_Key = tuple[tuple[int, torch.Size, tuple[int, ...], torch.dtype], ...]


class Recorder(Protocol):
    """What a runtime offers. One recorder serves one function, and keeps its memory."""

    def record(self, issue: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Callable[[], None]]:
        """Record what `issue` issues without running it: what it returned, and how to run what was recorded on the
        current lane. RuntimeError if it cannot be recorded; then nothing has run, and nothing is left behind."""
        ...

    def discard(self) -> None:
        """Called before a recording is dropped, which may be running."""
        ...


@dataclass(frozen=True)
class _Alias:
    """A result that lies in an argument."""

    argument: int
    whole: bool  # it is the argument itself
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int  # elements from the argument's start

    def take_from(self, tensors: Sequence[Tensor]) -> Tensor:
        tensor = tensors[self.argument]
        if self.whole:
            return tensor
        return tensor.as_strided(self.shape, self.strides, int(tensor.storage_offset()) + self.offset)


@dataclass(frozen=True)
class _Recording:
    results: tuple[Tensor | _Alias, ...]
    replay: Callable[[], None]
    counted: Counters


class CapturedFunction:
    """A function from tensors to tensors that is recorded at its second call with the same tensors.

    The first runs as it is, so that whatever is compiled or allocated once is there before anything is recorded. When
    recording fails the function runs as it is for good, and a warning says why.
    """

    def __init__(
        self,
        function: TensorFunction,
        recorder: Recorder,
        counters: Counters,
        name: str,
        tell: Callable[[str], object] = lambda failure: None,  # called once, when recording fails
    ) -> None:
        self._function = function
        self._recorder = recorder
        self._counters = counters
        self._name = name  # of the device, for the warning
        self._tell = tell
        self._recordings: OrderedDict[_Key, _Recording | None] = OrderedDict()  # None: it has run once
        self.failure = ""
        """Why nothing is recorded any more; "" while it is."""

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.failure:
            return self._function(tensors)
        key = tuple((one.data_ptr(), one.shape, one.stride(), one.dtype) for one in tensors)
        if key not in self._recordings:
            self._keep(key, None)
            return self._function(tensors)
        recording = self._recordings[key]
        if recording is None:
            try:
                recording = self._record(tensors)
            except RuntimeError as error:
                self._give_up(error)
                return self._function(tensors)
        else:
            self._counters.add(recording.counted)
        self._keep(key, recording)
        recording.replay()
        return [one.take_from(tensors) if isinstance(one, _Alias) else one for one in recording.results]

    def _record(self, tensors: Sequence[Tensor]) -> _Recording:
        before = self._counters.copy()
        try:
            results, replay = self._recorder.record(lambda: self._function(tensors))
            found = tuple(_find_alias(one, tensors) for one in results)
            return _Recording(found, replay, self._counters.since(before))
        except RuntimeError:
            self._counters.add(self._counters.since(before), times=-1)  # nothing of it has run
            raise

    def _keep(self, key: _Key, recording: _Recording | None) -> None:
        self._recordings[key] = recording
        self._recordings.move_to_end(key)
        if len(self._recordings) > KEPT:
            _, dropped = self._recordings.popitem(last=False)
            if dropped is not None:
                self._recorder.discard()

    def _give_up(self, error: RuntimeError) -> None:
        self.failure = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        self._recorder.discard()
        self._recordings.clear()
        self._tell(self.failure)
        warnings.warn(
            f"{self._name} cannot record {getattr(self._function, '__name__', 'a function')} ({self.failure}) and runs "
            "it as it is from now on, which takes the host longer; switch capturing off to be spared this warning",
            RuntimeWarning,
            stacklevel=3,
        )


def _find_alias(result: Tensor, tensors: Sequence[Tensor]) -> Tensor | _Alias:
    """The result itself, or where it lies in an argument: keeping it would keep the caller's memory."""
    for index, tensor in enumerate(tensors):
        if result is tensor:
            return _Alias(index, True, result.shape, result.stride(), 0)
    for index, tensor in enumerate(tensors):
        if result.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            if result.dtype != tensor.dtype:
                raise RuntimeError(f"result of {result.dtype} lies in argument {index} of {tensor.dtype}")
            offset = int(result.storage_offset()) - int(tensor.storage_offset())
            return _Alias(index, False, result.shape, result.stride(), offset)
    return result
