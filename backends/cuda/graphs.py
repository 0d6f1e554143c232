"""CUDA graphs: what a function issues, recorded on a stream aside and replayed with one call."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class GraphRecorder:
    """Records the graphs of one function, in one pool of memory and on one stream of their own.

    torch.cuda.graph would also wait for the device and empty the allocator's cache before each recording. Neither is
    needed, and both hold up other lanes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None  # made with the first recording
        self._pool: Any = None
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()  # that are alive

    def record(self, issue: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Callable[[], None]]:
        """As `captures.Recorder` says."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        if not self._graphs:  # a pool whose last graph is gone is given back, and takes no other
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Nothing runs on this stream, so it waits for no other; the replay takes its place on the caller's.
        with torch.cuda.stream(self._stream):
            # Calls of other threads, such as those of a library's watchdog, are none of this recording's business.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                results = issue()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # a recording that was broken off does not end well
                    self._end(graph)
                raise
            self._end(graph)
        self._graphs.add(graph)
        return results, graph.replay

    def discard(self) -> None:
        """Wait for the device: what a graph has allocated may be given to others once the graph is gone."""
        torch.cuda.synchronize(self._device)

    def _end(self, graph: Any) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            self._leave_pool()
            self._record_a_little()
            raise

    def _leave_pool(self) -> None:
        """The end of a recording that fails leaves the allocator believing that it goes on."""
        with contextlib.suppress(AttributeError, RuntimeError):  # there is no such call, or it has left already
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            torch._C._cuda_releasePool(self._device.index, self._pool)  # else its memory is never given back

    def _record_a_little(self) -> None:
        """The device's random generator believes so too, before torch 2.13, and refuses every draw until a recording
        ends well: this one."""
        with contextlib.suppress(RuntimeError):
            number = torch.zeros(1, device=self._device)
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(capture_error_mode="thread_local")
            number.zero_()  # torch warns of a graph of nothing
            graph.capture_end()
