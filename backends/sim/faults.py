"""The one fault that a simulated accelerator may have, and when it strikes."""

from __future__ import annotations

import os
import signal
import threading

import torch
from torch import Tensor

from windlass.accelerator.errors import CollectiveTimeout
from windlass.backends.cpu.transport import Call
from windlass.backends.sim.settings import Fault

_PATIENCE = 1.25  # times the timeout: the peers give up first, so that they name this rank


class Faults:
    """Counts a rank's collectives, barriers apart, as they are issued, and strikes the one that the fault names."""

    def __init__(self, fault: Fault | None, rank: int, timeout_seconds: float) -> None:
        self._fault = fault if fault is not None and fault.rank == rank else None
        self._rank = rank
        self._timeout_seconds = timeout_seconds
        self._issued = 0
        self._closed = threading.Event()

    def draw(self, call: Call) -> Fault | None:
        """Count this call; the fault, if it befalls it."""
        fault = self._fault
        if fault is None or call.kind == "barrier":
            return None
        if fault.kind == "inf" and (call.kind != "reduce_scatter" or not call.dtype.is_floating_point):
            return None
        self._issued += 1
        struck = self._issued == fault.at or (fault.kind == "slow" and self._issued > fault.at)
        return fault if struck else None

    def strike(self, fault: Fault, call: Call) -> None:
        """What happens on the lane in place of entering the call, or before that.

        Raises RuntimeError for "exception" and `CollectiveTimeout` for "drop"; does not return from "kill".
        """
        if fault.kind == "exception":
            raise RuntimeError(f"simulated failure of rank {self._rank} in {call}, its collective {fault.at}")
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind == "slow":
            self._closed.wait(fault.seconds)
        if fault.kind == "drop":
            self._closed.wait(_PATIENCE * self._timeout_seconds)
            raise CollectiveTimeout(
                f"rank {self._rank} never entered {call}, its collective {fault.at}, as the simulated fault 'drop' "
                "wants it; the others wait for it in vain"
            )

    def close(self) -> None:
        """End what waits."""
        self._closed.set()


def spoil(tensor: Tensor) -> Tensor:
    """A copy whose first element is inf; the tensor itself if it has none."""
    if not tensor.numel():
        return tensor
    spoiled = tensor.clone()
    spoiled[0] = torch.inf
    return spoiled
