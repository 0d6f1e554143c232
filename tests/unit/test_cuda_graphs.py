"""How a graph is recorded: in which order the runtime is called, and what is left when it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from windlass.backends.cuda.graphs import GraphRecorder

BROKEN_OFF = ["end", "device 1 leaves pool 1", "device 1 releases pool 1", "begin in its own, thread_local", "end"]


class Runtime:
    """As much of torch.cuda as is used, with a log."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.refuses = ""
        self.pools = 0
        self.in_pool = True
        self.draws = True  # the random generator, which refuses from the beginning of a recording to a good end

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runtime = self

        class Graph:
            def capture_begin(self, pool: object = "its own", capture_error_mode: str = "global") -> None:
                runtime.log.append(f"begin in {pool}, {capture_error_mode}")
                runtime.draws = False

            def capture_end(self) -> None:
                runtime.log.append("end")
                refuses, runtime.refuses = runtime.refuses, ""
                if refuses:
                    runtime.in_pool = refuses != "after leaving the pool"
                    raise RuntimeError("invalidated")
                runtime.draws = True

            def replay(self) -> None:
                runtime.log.append("replay")

        @contextmanager
        def stream(given: str) -> Iterator[None]:
            runtime.log.append(f"on {given}")
            yield
            runtime.log.append(f"off {given}")

        def make_pool() -> str:
            runtime.pools += 1
            return f"pool {runtime.pools}"

        fakes: dict[str, Any] = {
            "Stream": lambda device: f"stream of {device}",
            "graph_pool_handle": make_pool,
            "CUDAGraph": Graph,
            "stream": stream,
            "synchronize": lambda device: runtime.log.append("synchronize"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.get_device_module("cuda"), name, fake)

        def leave(index: int, pool: str) -> None:
            if not runtime.in_pool:
                raise RuntimeError("it has left already")
            runtime.log.append(f"device {index} leaves {pool}")

        def release(index: int, pool: str) -> None:
            runtime.log.append(f"device {index} releases {pool}")

        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", leave, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
        number = torch.zeros(1)
        monkeypatch.setattr(torch, "zeros", lambda size, device: number)


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
        "on stream of cuda:1", "begin in pool 1, thread_local", "issue", "end", "off stream of cuda:1"
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
    assert runtime.log[2:] == BROKEN_OFF
    assert runtime.draws


def test_a_function_that_fails_and_leaves_nothing_broken(runtime: Runtime, recorder: GraphRecorder) -> None:
    def issue() -> Sequence[Tensor]:
        raise ValueError("wrong shapes")

    with pytest.raises(ValueError, match="wrong shapes"):
        recorder.record(issue)
    assert runtime.log[2:] == ["end"]
    assert runtime.draws


def test_a_recording_that_does_not_end_well(runtime: Runtime, recorder: GraphRecorder) -> None:
    runtime.refuses = "end"
    with pytest.raises(RuntimeError, match="invalidated"):
        recorder.record(lambda: [])
    assert runtime.log[2:] == BROKEN_OFF
    assert runtime.draws


def test_a_pool_that_was_left_is_not_released_twice(runtime: Runtime, recorder: GraphRecorder) -> None:
    """torch ends the process if it is."""
    runtime.refuses = "after leaving the pool"
    with pytest.raises(RuntimeError, match="invalidated"):
        recorder.record(lambda: [])
    assert runtime.log[2:] == ["end", *BROKEN_OFF[3:]]


def test_graphs_share_a_pool_as_long_as_one_lives(runtime: Runtime, recorder: GraphRecorder) -> None:
    """torch takes no graph into a pool whose last graph is gone."""
    first = recorder.record(lambda: [])
    second = recorder.record(lambda: [])
    del first
    third = recorder.record(lambda: [])
    del second, third
    recorder.record(lambda: [])
    begun = [line for line in runtime.log if line.startswith("begin")]
    assert begun == [f"begin in pool {number}, thread_local" for number in (1, 1, 1, 2)]
