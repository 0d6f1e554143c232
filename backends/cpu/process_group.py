"""How the ranks of a job find each other: through torch.distributed and its gloo backend."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # what torch.distributed exports untyped

from windlass.accelerator.environment import Environment
from windlass.accelerator.errors import BackendUnusable, CollectiveTimeout


@dataclass
class Membership:
    """This process's place among the ranks, and the process group through which it reaches them."""

    rank: int
    num_ranks: int
    process_group: dist.ProcessGroup | None  # None in a world of one
    created_world: bool = False  # we initialised torch.distributed, so we destroy it

    def new_group(self, ranks: tuple[int, ...], timeout_seconds: float) -> dist.ProcessGroup | None:
        """A gloo group of some ranks; all ranks of the world call it. None on ranks outside."""
        group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_seconds), backend="gloo")
        return group if self.rank in ranks else None

    def leave(self) -> None:
        """Destroy what `join` created and nothing else."""
        if self.process_group is None or not dist.is_initialized():
            return
        if self.created_world:
            dist.destroy_process_group()
        else:
            dist.destroy_process_group(self.process_group)
        self.process_group = None


@dataclass
class _Meeting:
    """The store at one address, kept from one opening of the device to the next.

    A store that is torn down and served again at the same address may still be reached by a rank that was
    quicker to come back, and the keys of the first meeting would be taken for those of the second.
    """

    address: str
    store: Store
    openings: int = 0


_meetings: list[_Meeting] = []  # at most the last one


def join(environment: Environment) -> Membership:
    """Become a rank: of the user's process group if there is one, else of the job that the environment describes.

    Raises `CollectiveTimeout` if other ranks do not come in time, `BackendUnusable` if they cannot be reached.
    """
    timeout = timedelta(seconds=environment.timeout_seconds)
    if dist.is_available() and dist.is_initialized():
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        # a group of our own, so that the user's traffic and ours never mix
        return Membership(rank, num_ranks, dist.new_group(timeout=timeout, backend="gloo") if num_ranks > 1 else None)
    if environment.num_ranks == 1:
        return Membership(0, 1, None)
    where = f"{environment.master_address}:{environment.master_port}"
    started = time.monotonic()
    # Its functions have the default group of the moment of import as a default argument. Imported later, by torch's
    # compiler, they would keep our group and its threads, which may then take the interpreter down at its end.
    importlib.import_module("torch.distributed.nn")
    try:
        store = _open_store(environment, where, timeout)
        dist.init_process_group(
            "gloo", store=store, rank=environment.rank, world_size=environment.num_ranks, timeout=timeout
        )
    except RuntimeError as error:  # what torch raises for a store or a connection, its own kinds included
        if dist.is_initialized():
            dist.destroy_process_group()
        _meetings.clear()
        if time.monotonic() - started >= 0.9 * environment.timeout_seconds or "timed out" in str(error).lower():
            raise CollectiveTimeout(
                f"not all of the {environment.num_ranks} ranks that are expected came to {where} within "
                f"{environment.timeout_seconds:g} s while rank {environment.rank} waited; start all of them, or check "
                "MASTER_ADDR, MASTER_PORT and WORLD_SIZE"
            ) from error
        raise BackendUnusable(
            f"cpu:0 of rank {environment.rank} cannot join {environment.num_ranks} ranks at {where}: "
            f"{str(error).splitlines()[0]}; check MASTER_ADDR and MASTER_PORT"
        ) from error
    assert dist.group.WORLD is not None
    return Membership(environment.rank, environment.num_ranks, dist.group.WORLD, created_world=True)


def _open_store(environment: Environment, where: str, timeout: timedelta) -> Store:
    """The job's store, under a prefix that is new at every opening and every restart."""
    if not _meetings or _meetings[0].address != where:
        _meetings.clear()
        store = TCPStore(
            environment.master_address,
            environment.master_port,
            environment.num_ranks,
            is_master=environment.rank == 0 and not environment.store_served,
            timeout=timeout,
            wait_for_workers=not environment.store_served,
            multi_tenant=True,
        )
        _meetings.append(_Meeting(where, store))
    meeting = _meetings[0]
    meeting.openings += 1
    return PrefixStore(f"windlass/{environment.attempt}/{meeting.openings}", meeting.store)
