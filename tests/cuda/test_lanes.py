"""Lanes are streams: they overlap, wait for each other's points, and the host need not wait inside the runtime."""

from __future__ import annotations

import time

import pytest
import torch

from windlass.accelerator.errors import PeerLost
from windlass.backends.cuda.device import CudaAccelerator

HALF_A_SECOND = 900_000_000  # cycles of a GPU of about 1.8 GHz


@pytest.fixture(autouse=True)
def _load_kernels(accelerator: CudaAccelerator) -> None:
    """The runtime loads a kernel when it is first launched, and may wait for all lanes then."""
    torch.zeros(3, device=accelerator.device).fill_(1).add_(1).mul_(2)
    accelerator.streams.synchronize()


def test_a_long_kernel_on_one_lane_delays_no_other(accelerator: CudaAccelerator) -> None:
    values = torch.ones(1000, device=accelerator.device)
    accelerator.streams.synchronize()
    with accelerator.streams.lane("gather"):
        accelerator.module._sleep(HALF_A_SECOND)
        slow = accelerator.streams.record()
    for name in ("compute", "reduce", "up", "down"):
        with accelerator.streams.lane(name):
            values.add_(1)
            quick = accelerator.streams.record()
        quick.block()
        assert not slow.done(), name
    slow.block()
    assert slow.done()


def test_a_lane_waits_for_a_point_of_another(accelerator: CudaAccelerator) -> None:
    values = torch.zeros(1000, device=accelerator.device)
    accelerator.streams.synchronize()
    with accelerator.streams.lane("gather"):
        accelerator.module._sleep(HALF_A_SECOND)
        values.fill_(3)
        written = accelerator.streams.record()
    assert not written.done()  # the host goes on at once
    written.wait()
    doubled = values * 2
    assert accelerator.to_host(doubled).tolist() == [6.0] * 1000


def test_reading_by_asking_gives_the_value_and_is_counted(
    accelerator: CudaAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []
    monkeypatch.setattr(accelerator.streams.host_wait, "_watch", lambda: looks.append(time.monotonic()))
    accelerator.module._sleep(HALF_A_SECOND)
    value = torch.full((3,), 2.5, device=accelerator.device)
    assert accelerator.read_host(value, tag="test") == [2.5] * 3
    assert accelerator.counters.host_reads == 1
    assert len(looks) >= 2  # one while it waited, one at the end


def test_a_read_is_left_when_a_peer_is_lost(accelerator: CudaAccelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def watch() -> None:
        raise PeerLost("rank 1 died")

    monkeypatch.setattr(accelerator.streams.host_wait, "_watch", watch)
    for _ in range(4):
        accelerator.module._sleep(HALF_A_SECOND)
    value = torch.zeros(1, device=accelerator.device)
    end = accelerator.streams.record()
    with pytest.raises(PeerLost, match="rank 1 died"):
        accelerator.read_host(value, tag="test")
    assert not end.done()
    monkeypatch.undo()
