"""What is done about a group whose library has failed, without a peer: problems are read, and everything is ended."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fake_plugins import raises_sentence
from recorded_device import RecordedModule
from windlass.accelerator.counters import Counters
from windlass.accelerator.environment import Environment
from windlass.accelerator.errors import PeerLost
from windlass.accelerator.interface import Group
from windlass.backends.generic.collectives import ProcessGroupCollectives
from windlass.backends.generic.device import open_device
from windlass.backends.generic.process_groups import ProcessGroupTransport, read_problem
from windlass.backends.generic.streams import DeviceLanes

WORLD = Group("world", (0, 1), 0)


class State(Enum):
    SUCCESS = 0
    REMOTE_ERROR = 1


class FailingGroup:
    """A process group with a watchdog, as NCCL's is."""

    _device_types = (torch.device("cpu"),)

    def __init__(self, *, can_abort: bool = True) -> None:
        self.state = State.SUCCESS
        self.aborted = 0
        self._can_abort = can_abort

    def _get_backend(self, device: torch.device) -> Any:
        return SimpleNamespace(get_error=lambda: self.state)

    def abort(self) -> None:
        self.aborted += 1
        if not self._can_abort:
            raise RuntimeError("this library cannot abort")


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")


def make_transport(process_group: Any, lanes: DeviceLanes) -> ProcessGroupTransport:
    return ProcessGroupTransport(
        WORLD, process_group, None, lanes, agreement="first use", ordered=False, timeout_seconds=5.0
    )


@pytest.mark.usefixtures("named")
def test_what_the_library_says_of_a_group() -> None:
    group: Any = FailingGroup()
    assert read_problem(group) == ""
    group.state = State.REMOTE_ERROR
    assert read_problem(group) == "nccl reports REMOTE_ERROR"
    assert read_problem(SimpleNamespace()) == ""  # type: ignore[arg-type]  # one that says nothing


@pytest.mark.usefixtures("named")
def test_one_failure_ends_all_groups_and_is_remembered() -> None:
    lanes = DeviceLanes(RecordedModule())
    failing, other = FailingGroup(), FailingGroup(can_abort=False)
    collectives = ProcessGroupCollectives("gpu:0", torch.device("cpu"), lanes, Counters(), Environment())
    collectives._device_transports += [make_transport(other, lanes), make_transport(failing, lanes)]
    lanes.host_wait.look_after(collectives.look)
    lanes._module.Event = lambda: SimpleNamespace(record=lambda stream: None, query=lambda: True)
    lanes.record().block()
    failing.state = State.REMOTE_ERROR
    with raises_sentence(
        PeerLost, "a rank of group 'world' was lost while rank 0 was in a collective: nccl reports REMOTE_ERROR"
    ):
        lanes.record().block()
    assert (failing.aborted, other.aborted) == (1, 1)
    lanes.record().block()  # closing may wait for the device again
    with raises_sentence(
        PeerLost,
        "gpu:0 makes no more collectives since one failed (a rank of group 'world' was lost while rank 0 was in a "
        "collective: nccl reports REMOTE_ERROR); start the job again",
    ):
        collectives.barrier(collectives.world)
    collectives.close()


def test_closing_leaves_the_groups_when_a_peer_is_lost_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = open_device("cpu", name="generic")

    def wait() -> None:
        raise PeerLost("rank 1 died")

    monkeypatch.setattr(accelerator.memory, "close", wait)
    with pytest.raises(PeerLost, match="rank 1 died"):
        accelerator.close()
    with pytest.raises(ValueError, match="the collectives are closed"):
        accelerator.collectives.barrier(accelerator.collectives.world)
