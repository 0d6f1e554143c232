"""How a graph is recorded: in which order the runtime is called, and what is left when it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from windlass.backends.cuda.graphs import GraphRecorder


class Runtime:
    """As much of torch.cuda as is used, with a log."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.refuses = ""

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runtime = self

        class Graph:
            def capture_begin(self, pool: object, capture_error_mode: str) -> None:
                runtime.log.append(f"begin in {pool}, {capture_error_mode}")

            def capture_end(self) -> None:
                runtime.log.append("end")
                if runtime.refuses == "end":
                    raise RuntimeError("invalidated")

            def replay(self) -> None:
                runtime.log.append("replay")

        @contextmanager
        def stream(given: str) -> Iterator[None]:
            runtime.log.append(f"on {given}")
            yield
            runtime.log.append(f"off {given}")

        fakes: dict[str, Any] = {
            "Stream": lambda device: f"stream of {device}",
            "graph_pool_handle": lambda: "pool",
            "CUDAGraph": Graph,
            "stream": stream,
            "synchronize": lambda device: runtime.log.append("synchronize"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.get_device_module("cuda"), name, fake)

        def leave(index: int, pool: str) -> None:
            runtime.log.append(f"device {index} leaves {pool}")

        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", leave, raising=False)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    fake = Runtime()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def recorder() -> GraphRecorder:
    return GraphRecorder(torch.device("cuda", 1))


def test_a_recording_on_a_stream_aside(runtime: Runtime, recorder: GraphRecorder) -> None:
    def issue() -> Sequence[Tensor]:
        runtime.log.append("issue")
        return [torch.ones(1)]

    results, replay = recorder.record(issue)
    assert runtime.log == [
        "on stream of cuda:1", "begin in pool, thread_local", "issue", "end", "off stream of cuda:1"
    ]  # fmt: skip
    assert [one.tolist() for one in results] == [[1.0]]
    runtime.log.clear()
    replay()
    recorder.discard()
    assert runtime.log == ["replay", "synchronize"]


def test_a_function_that_fails_is_broken_off_in_order(runtime: Runtime, recorder: GraphRecorder) -> None:
    def issue() -> Sequence[Tensor]:
        raise RuntimeError("no host reads here")

    runtime.refuses = "end"
    with pytest.raises(RuntimeError, match="no host reads here"):
        recorder.record(issue)
    assert runtime.log[-2:] == ["end", "device 1 leaves pool"]


def test_a_recording_that_does_not_end_well(runtime: Runtime, recorder: GraphRecorder) -> None:
    runtime.refuses = "end"
    with pytest.raises(RuntimeError, match="invalidated"):
        recorder.record(lambda: [])
    assert runtime.log[-2:] == ["end", "device 1 leaves pool"]
