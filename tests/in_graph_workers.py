"""What the ranks of tests/xla/test_in_graph_agreement.py run: real processes that meet on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from windlass.accelerator.counters import Counters
from windlass.accelerator.environment import read_environment
from windlass.accelerator.errors import WindlassError
from windlass.backends.cpu.transport import Call, Transport
from windlass.backends.xla.collectives import HostMeeting
from windlass.backends.xla.in_graph import InGraphTransport, Partitions, exchange_ordinals


@contextmanager
def opened() -> Iterator[Transport]:
    """What carries host memory between all ranks."""
    host = HostMeeting(Counters(), read_environment())
    try:
        yield host.transport(host.world)
    finally:
        host.close()


def differ(what: str) -> tuple[str, str]:
    """Make calls that do not match over the ranks; the last rank's are other ones. What it raises."""
    with opened() as host:
        world = host.group
        last = world.rank == world.size - 1
        transport = InGraphTransport(world, Partitions(world.ranks).join(world.ranks), host)
        tensor = torch.zeros(5 if what == "size" and last else 4)
        if what == "splits":
            splits = [2, 2]
            call = Call("all_to_all", "x", -1, tensor.dtype)
            return _raised(
                lambda: transport.all_to_all(tensor, tensor.clone(), splits, [1, 3] if last else splits, call)
            )
        if what == "kind" and last:
            call = Call("broadcast", "norm", tensor.nbytes, tensor.dtype, source=0)
            return _raised(lambda: transport.broadcast(tensor, 0, call))
        call = Call("all_reduce", "norm", tensor.nbytes, tensor.dtype, op="sum")
        return _raised(lambda: transport.all_reduce(tensor, "sum", call))


def find_ordinals() -> tuple[str, str]:
    """Processes whose XLA clients do not know of each other."""
    with opened() as host:
        return _raised(lambda: exchange_ordinals(host))


def _raised(use: Callable[[], object]) -> tuple[str, str]:
    try:
        use()
    except WindlassError as error:
        return type(error).__name__, str(error)
    return "", ""
