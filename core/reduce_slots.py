"""The buffers in which a unit's gradients lie packed while they are being reduced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator, Group
from windlass.core.plan import Plan, Region
from windlass.core.specs import dtype_from_name

TAG = "reduce_slots"


class ReduceSlots:
    """As many slots as the plan has: kept as bytes that every unit reads in its own dtypes, or, where a buffer cannot
    be read in several dtypes, made anew for each use."""

    def __init__(self, plan: Plan, accelerator: Accelerator, group: Group) -> None:
        self.count = len(plan.reduce_slot_bytes)
        self._memory = accelerator.memory
        self._group = group
        self._kept: list[Tensor] = []
        if plan.rules.buffers == "kept":
            self._kept = [
                self._memory.empty((size,), torch.uint8, tag=TAG, shared=group) for size in plan.reduce_slot_bytes
            ]

    def take(self, slot: int, regions: Sequence[Region]) -> Iterator[tuple[Region, Tensor]]:
        """A place for the packed gradients of each region, in the region's gradient dtype. The slot must be free."""
        offset = 0
        for region in regions:
            dtype = dtype_from_name(region.gradient_dtype)
            if self._kept:
                size = region.numel * dtype.itemsize
                yield region, self._kept[slot][offset : offset + size].view(dtype)
                offset += size
            else:
                yield region, self._memory.empty((region.numel,), dtype, tag=TAG, shared=self._group)

    def give_back(self, packed: Tensor) -> None:
        """The place has been read: nobody needs it any more."""
        if not self._kept:
            self._memory.release(packed)

    def close(self) -> None:
        """Give the memory back."""
        while self._kept:
            self._memory.release(self._kept.pop())
