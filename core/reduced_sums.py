"""Memory for the sums over ranks of gradients: made for each step, or kept where a captured update reads them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator, Group
from windlass.core.plan import Region

TAG = "reduced"


class ReducedSums:
    """Hands out fp32 vectors. The first one that a region asks for in a step is, where they are kept, the one that it
    gave back at the end of the step before."""

    def __init__(self, accelerator: Accelerator, group: Group, kept: Iterable[Region]) -> None:
        """`kept`: the regions whose shard of the sum lies in the same place in every step."""
        self._accelerator = accelerator
        self._group = group
        self._idle = {region.name: self.allocate(region.shard_numel) for region in kept}
        self._kept = frozenset(self._idle)

    def allocate(self, numel: int, *, shared: bool = False) -> Tensor:
        """A vector for whatever is summed; `shared`: it takes part in collectives."""
        group = self._group if shared else None
        return self._accelerator.memory.empty((numel,), torch.float32, tag=TAG, shared=group)

    def take(self, region: Region) -> Tensor:
        """A vector for the shard of a region's sum."""
        idle = self._idle.pop(region.name, None)
        return self.allocate(region.shard_numel) if idle is None else idle

    def give_back(self, region: Region, shard: Tensor) -> None:
        """The step is over: the vector that was taken first."""
        if region.name in self._kept:
            self._idle[region.name] = shard
        else:
            self._accelerator.memory.release(shard)

    def close(self) -> None:
        """Give the memory back, once every vector is."""
        while self._idle:
            self._accelerator.memory.release(self._idle.popitem()[1])
