"""Workers that tests/ranks/test_sim_faults.py runs on ranks of the simulated accelerator."""

from __future__ import annotations

import time

import torch

from windlass.conformance.opening import opened


def meet_often(num_calls: int, kind: str) -> tuple[str, str, str, list[float]]:
    """Call after call, each waited for: the error that ends it, its cause, and the seconds that each call took."""
    seconds: list[float] = []
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        collectives.barrier(world)
        try:
            for _ in range(num_calls):
                begun = time.monotonic()
                try:
                    if kind == "all_gather":
                        mine, output = torch.ones(2), torch.zeros(2 * world.size)
                        collectives.all_gather(output, mine, world, tag="weights").wait()
                    else:
                        vector = torch.ones(2)
                        collectives.all_reduce(vector, world, tag="norm").wait()
                finally:
                    seconds.append(time.monotonic() - begun)
        except RuntimeError as error:
            return type(error).__name__, str(error), type(error.__cause__).__name__, seconds
        return "nothing", "", "", seconds


def overflow_once() -> list[tuple[float, bool]]:
    """Three reduce-scatters among other calls: the first sum of each, and whether the input is what it was."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        results = []
        for number in range(3):
            collectives.all_reduce(torch.ones(1), world).wait()
            mine, output = torch.full((2 * world.size,), float(number)), torch.zeros(2)
            collectives.reduce_scatter(output, mine, world, tag="gradients").wait()
            results.append((output[0].item(), bool((mine == number).all())))
            assert output[1].item() == number * world.size
        return results
