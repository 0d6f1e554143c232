"""Gradients that add up on this rank until the boundary: in the region's buffer, or, where no parameter can live in
one, each by itself until the region is packed.

[Note: wide sums] A region whose plan expects one gradient has that gradient's dtype. If more land, they add up in fp32
from there to the boundary, and are rounded once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator, Group
from windlass.core.plan import Placement, Plan, Region
from windlass.core.specs import dtype_from_name

TAG = "gradients"


class LocalGradients(ABC):
    """The sums of this rank; a name is *new* when nothing of it has landed since the last `clear`."""

    def __init__(self, plan: Plan, accelerator: Accelerator, group: Group) -> None:
        self._plan = plan
        self._accelerator = accelerator
        self._group = group

    @abstractmethod
    def land(self, name: str, gradient: Tensor, scale: float, *, new: bool) -> None:
        """Add one gradient, times `scale`."""

    @abstractmethod
    def whole(self, region: Region, landed: set[str]) -> Tensor:
        """The sums of a region [numel] in its gradient dtype, zero for what is not in `landed`. It is the same memory
        until `clear`."""

    def take(self, region: Region, landed: set[str]) -> Tensor:
        """The same for the last time before `clear`."""
        return self.whole(region, landed)

    @abstractmethod
    def clear(self) -> None:
        """Forget the sums."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back."""

    def _needs_width(self, region: Region) -> bool:
        return region.gradient_dtype != "float32" and self._plan.gradient_accumulation_steps == 1

    def _allocate(self, region: Region) -> Tensor:
        dtype = dtype_from_name(region.gradient_dtype)
        return self._accelerator.memory.empty((region.numel,), dtype, tag=TAG, shared=self._group)


class KeptGradients(LocalGradients):
    """In buffers that are there for the whole training: a gradient is copied to its place as it lands."""

    def __init__(self, plan: Plan, accelerator: Accelerator, group: Group) -> None:
        super().__init__(plan, accelerator, group)
        trainable = [region for region in plan.regions if region.trainable]
        self._buffers = {region.name: self._allocate(region).zero_() for region in trainable}
        self._wide: dict[str, Tensor] = {}  # fp32 sums of regions in which more landed than planned

    def land(self, name: str, gradient: Tensor, scale: float, *, new: bool) -> None:
        region, placement = self._plan.placement_by_name[name]
        if not new and self._needs_width(region) and region.name not in self._wide:
            wide = self._accelerator.memory.empty((region.numel,), torch.float32, tag="wide gradients")
            self._wide[region.name] = wide.copy_(self._buffers[region.name])
        target = self._wide.get(region.name, self._buffers[region.name])
        target = target[placement.start : placement.stop].view(placement.shape)
        if not new:
            target.add_(gradient, alpha=scale)
            return
        target.copy_(gradient)
        if scale != 1.0:
            target.mul_(scale)

    def whole(self, region: Region, landed: set[str]) -> Tensor:
        buffer = self._buffers[region.name]
        if region.name in self._wide:
            buffer.copy_(self._wide[region.name])
        for placement in region.placements:
            if placement.name not in landed:
                buffer[placement.start : placement.stop].zero_()
        return buffer

    def clear(self) -> None:
        for name in list(self._wide):
            self._accelerator.memory.release(self._wide.pop(name))

    def close(self) -> None:
        self.clear()
        while self._buffers:
            self._accelerator.memory.release(self._buffers.popitem()[1])


class SeparateGradients(LocalGradients):
    """Each by itself, as autograd made it: a lazy device sees sums and one concatenation, and no writes into slices."""

    def __init__(self, plan: Plan, accelerator: Accelerator, group: Group) -> None:
        super().__init__(plan, accelerator, group)
        self._sums: dict[str, Tensor] = {}
        self._packed: dict[str, Tensor] = {}

    def land(self, name: str, gradient: Tensor, scale: float, *, new: bool) -> None:
        region, _ = self._plan.placement_by_name[name]
        dtype = torch.float32 if not new and self._needs_width(region) else dtype_from_name(region.gradient_dtype)
        if not new:
            self._sums[name] = torch.add(self._sums[name].to(dtype), gradient, alpha=scale).to(dtype)
        elif scale == 1.0:
            self._sums[name] = gradient.to(dtype)
        else:
            self._sums[name] = gradient.to(dtype) * scale

    def whole(self, region: Region, landed: set[str]) -> Tensor:
        if region.name not in self._packed:
            self._packed[region.name] = self._allocate(region)
        values = {one.name: self._sums[one.name] for one in region.placements if one.name in landed}
        return pack(self._packed[region.name], region, values, 1.0)

    def take(self, region: Region, landed: set[str]) -> Tensor:
        packed = self.whole(region, landed)
        for placement in region.placements:
            self._sums.pop(placement.name, None)
        return packed

    def clear(self) -> None:
        self._sums.clear()
        while self._packed:
            self._accelerator.memory.release(self._packed.popitem()[1])

    def close(self) -> None:
        self.clear()


def open_local_gradients(plan: Plan, accelerator: Accelerator, group: Group) -> LocalGradients:
    """What the plan's rules ask for."""
    kind = KeptGradients if plan.rules.buffers == "kept" else SeparateGradients
    return kind(plan, accelerator, group)


def pack(target: Tensor, region: Region, values: Mapping[str, Tensor], scale: float) -> Tensor:
    """target = the values one after the other, times `scale` in the dtype of `target`; zero where there is none."""
    pieces = []
    position = 0
    for placement in region.placements:
        pieces.append(_zeros(placement.start - position, target))
        pieces.append(_flat(placement, values.get(placement.name), scale, target))
        position = placement.stop
    pieces.append(_zeros(region.numel - position, target))
    return target.copy_(torch.cat([piece for piece in pieces if piece.numel()] or pieces))


def write_packed(target: Tensor, region: Region, values: Mapping[str, Tensor], scale: float) -> None:
    """The same as `pack`, written in place without a second buffer."""
    position = 0
    for placement in region.placements:
        if position < placement.start:
            target[position : placement.start].zero_()
        position = placement.stop
        part = target[placement.start : placement.stop]
        value = values.get(placement.name)
        if value is None:
            part.zero_()
            continue
        part.view(placement.shape).copy_(value)
        if scale != 1.0:
            part.mul_(scale)
    if position < region.numel:
        target[position:].zero_()


def _flat(placement: Placement, value: Tensor | None, scale: float, target: Tensor) -> Tensor:
    if value is None:
        return _zeros(placement.numel, target)
    flat = value.reshape(-1).to(target.dtype)
    return flat if scale == 1.0 else flat * scale


def _zeros(count: int, like: Tensor) -> Tensor:
    return torch.zeros(count, dtype=like.dtype, device=like.device)
