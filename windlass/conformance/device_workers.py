"""What ranks and fresh processes do in the tests of level 0."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from typing import Final

import torch

import windlass
from windlass.accelerator.interface import Accelerator
from windlass.conformance.allocations import allocated, assert_holds, bring, used
from windlass.conformance.opening import opened

FRAMEWORKS: Final = ("torch", "torch_xla", "jax", "numba", "triton", "cupy", "tensorflow", "pynvml")


def compute_on_a_shape_of_its_own() -> float:
    """Each rank sums another number of ones; the sum of the sums comes back, 1 + 2 on two ranks."""
    with opened() as accelerator:
        world = accelerator.collectives.world
        count = world.rank + 1
        with allocated(accelerator, torch.ones(count)) as own, allocated(accelerator, torch.zeros(1)) as total:
            for _ in range(count):
                own.mul_(1.0)
            total.copy_(own.sum().reshape(1))
            accelerator.collectives.all_reduce(total, world).wait()
            return accelerator.read_host(total, tag="conformance")[0]


def share_the_device(name: str) -> str:
    """Each rank opens the device of this name and fills memory, one after the other; each finds its own and no more."""
    with contextlib.closing(windlass.open_accelerator(name)) as accelerator:
        world = accelerator.collectives.world
        for turn in world.ranks:
            assert used(accelerator) == 0
            if turn != world.rank:
                accelerator.collectives.barrier(world)
                assert used(accelerator) == 0, "memory of another rank is in the books of this one"
                accelerator.collectives.barrier(world)
                continue
            with allocated(accelerator, torch.full((1000,), float(world.rank))) as own:
                accelerator.collectives.barrier(world)  # the others look now
                assert used(accelerator) == 4000
                accelerator.collectives.barrier(world)
                assert_holds(accelerator, own, torch.full((1000,), float(world.rank)))
        check_random_stream(accelerator, world.rank)
        return accelerator.name


def check_random_stream(accelerator: Accelerator, rank: int) -> None:
    """The stream of this rank follows its seed, whatever the others draw."""
    drawn = []
    for _ in range(2):
        accelerator.seed(rank)
        accelerator.collectives.barrier(accelerator.collectives.world)
        drawn.append(accelerator.to_host(torch.rand(100, device=accelerator.device)))
    assert torch.equal(*drawn)


def close_twice() -> str:
    """The device is opened, used and closed, and closed again."""
    with opened() as accelerator:
        assert accelerator.read_host(bring(accelerator, torch.ones(2)), tag="conformance") == [1.0, 1.0]
        accelerator.close()
        return accelerator.name


def frameworks_after_loading(backend: str) -> list[str]:
    """Which frameworks a new process has imported when it has loaded the module of a backend's entry point."""
    code = (
        "import json, sys\n"
        "from windlass.accelerator.plugins import candidates\n"
        f"[one.entry_point.load() for one in candidates() if one.name == {backend!r}]\n"
        f"print(json.dumps([name for name in {FRAMEWORKS!r} if name in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    assert isinstance(found, list)
    return found
