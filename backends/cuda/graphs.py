"""CUDA graphs: what a function issues, recorded on a stream aside and replayed with one call."""

from __future__ import annotations

import contextlib
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

    def record(self, issue: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Callable[[], None]]:
        """As `captures.Recorder` says."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
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
                    graph.capture_end()
                self._leave_pool()
                raise
            try:
                graph.capture_end()
            except RuntimeError:
                self._leave_pool()
                raise
        return results, graph.replay

    def discard(self) -> None:
        """Wait for the device: a graph may not be destroyed while it runs."""
        torch.cuda.synchronize(self._device)

    def _leave_pool(self) -> None:
        """The end of a recording that fails leaves the allocator believing that it goes on."""
        leave = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if leave is not None:
            with contextlib.suppress(RuntimeError):  # it has left already
                leave(self._device.index, self._pool)
