"""Each rank needs a GPU of its own: what is checked before ranks meet, and what they compare when they have."""

from __future__ import annotations

import json
from collections.abc import Sequence

from windlass.accelerator.environment import Environment
from windlass.accelerator.errors import BackendUnusable
from windlass.backends.cpu.peers import describe_self
from windlass.backends.cuda.driver import Driver


def check_ranks(name: str, environment: Environment, count: int) -> None:
    """`BackendUnusable` if this host has more ranks than this process sees GPUs, unless the launcher shows each one."""
    if environment.local_num_ranks > count > 1:
        raise BackendUnusable(
            f"{name} cannot be opened: there are {environment.local_num_ranks} ranks on this host and "
            f"{count} GPUs, and each needs its own; start {count} ranks here"
        )


def describe_own_device(driver: Driver, index: int) -> str:
    """What ranks tell each other so that no two of them use one GPU."""
    return json.dumps([describe_self(0).host, driver.identity(index), driver.pci_address(index)])


def check_own_devices(name: str, rows: Sequence[str]) -> None:
    """`BackendUnusable` on every rank if two ranks have the same GPU; `rows` by rank, of `describe_own_device`."""
    owners: dict[tuple[str, str], int] = {}
    for rank, row in enumerate(rows):
        host, identity, address = json.loads(row)
        first = owners.setdefault((host, identity), rank)
        if first != rank:
            ranks = sum(json.loads(other)[0] == host for other in rows)
            devices = len({json.loads(other)[1] for other in rows if json.loads(other)[0] == host})
            raise BackendUnusable(
                f"{name} cannot be opened: ranks {first} and {rank} have the same GPU at {address}, for there are "
                f"{ranks} ranks on their host and {devices} {'GPU' if devices == 1 else 'GPUs'}; start one rank for "
                "each GPU, or see CUDA_VISIBLE_DEVICES"
            )
