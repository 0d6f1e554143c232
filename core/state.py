"""The bytes of a plan: weights, master weights and moments in regions, and parameters bound to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from windlass.accelerator.interface import Accelerator, Group
from windlass.core.materialize import materialize_modules, move_parameter
from windlass.core.muon import MOMENTUM
from windlass.core.plan import Placement, Plan, Region
from windlass.core.specs import dtype_from_name, dtype_name
from windlass.core.step_counts import DeviceStepCounts, HostStepCounts, StepCounts

WEIGHT = "weight"
EXP_AVG = "exp_avg"
EXP_AVG_SQ = "exp_avg_sq"
MOMENTS = {"adamw": (EXP_AVG, EXP_AVG_SQ), "muon": (MOMENTUM,)}
"""What each algorithm keeps of the gradients, by the names that checkpoints have them under."""
Ranges = tuple[tuple[int, int], ...]
"""Elements [start, stop) of a region, several times."""
STALE_WEIGHTS = (
    "a backward pass reached weights that an optimizer step has changed since the forward pass; call backward before "
    "step, or run the forward pass again"
)


class ModelState:
    """Owns the allocations of one plan on one rank.

    `weights[region]` is the whole region where weights are resident, else this rank's shard. `owned_bounds`
    says which part of the region this rank's master weights and moments cover.
    """

    def __init__(self, plan: Plan, module: nn.Module, accelerator: Accelerator, group: Group) -> None:
        self.plan = plan
        self.accelerator = accelerator
        self.group = group
        self.module = module
        self.weights: dict[str, Tensor] = {}
        self.master: dict[str, Tensor] = {}  # fp32; absent where the weights themselves are fp32, and lie with them
        self.moments: dict[str, dict[str, Tensor]] = {}
        uniform = plan.rules.program == "uniform"
        names = list(plan.parameter_index)
        self.steps: StepCounts = DeviceStepCounts(names, accelerator) if uniform else HostStepCounts(names)
        self.parameters: dict[str, nn.Parameter] = {}
        self.resident = plan.rules.weights == "resident"
        self._poison: dict[torch.dtype, Tensor] = {}
        self._masks: dict[tuple[str, str], dict[Ranges, Tensor]] = {}  # by region and use: those that were used last
        for unit in plan.units:  # one at a time: a sharded model never exists whole
            regions = [plan.region_by_name[name] for name in unit.regions]
            names = [placement.name for region in regions for placement in region.placements]
            materialize_modules(module, (name.rpartition(".")[0] for name in names), accelerator.device)
            found = dict(module.named_parameters(remove_duplicate=False))
            self.parameters.update({name: found[name] for name in names})
            for region in regions:
                self._install(region)
        self._tie_aliases()
        materialize_modules(module, dict(module.named_modules()), accelerator.device)  # those with buffers only

    # -- layout ------------------------------------------------------------------------------------------------

    def owned_bounds(self, region: Region) -> tuple[int, int]:
        """The part of the region whose update happens here."""
        if self.plan.rules.update == "replicated":
            return 0, region.numel
        return region.shard_bounds(self.group.rank)

    def owned_weights(self, region: Region) -> Tensor:
        """The weights of `owned_bounds` in the region's dtype: aliasing `weights`, or made of the master weights where
        shards lie apart."""
        weights = self.weights[region.name]
        if not self.resident or self.plan.rules.update == "replicated":
            return weights
        if self.plan.shards_apart:
            return self.master[region.name].to(weights.dtype)
        return own_part(region, weights, self.group)

    def owned_fp32(self, region: Region) -> Tensor:
        """What the optimizer updates: the master weights, or the weights themselves if they are fp32."""
        return self.master[region.name] if region.name in self.master else self.owned_weights(region)

    def owned_low(self, region: Region) -> Tensor | None:
        """The low-precision weights that an update writes beside the master weights; None where there are none, or
        they are made of the master weights afterwards."""
        if region.dtype == "float32" or self.plan.shards_apart:
            return None
        return self.owned_weights(region)

    # -- installation ------------------------------------------------------------------------------------------

    def _tie_aliases(self) -> None:
        """Tied names share one parameter; materialising a meta model may have made two of it."""
        for alias, owner in self.plan.aliases.items():
            if owner in self.parameters:
                path, _, leaf = alias.rpartition(".")
                setattr(self.module.get_submodule(path), leaf, self.parameters[owner])

    def _install(self, region: Region) -> None:
        """Take the parameters' values from rank 0, lay them out, and bind the parameters to their places."""
        memory = self.accelerator.memory
        dtype = dtype_from_name(region.dtype)
        whole = memory.empty((region.numel,), torch.float32, tag="staging")
        self._stage(region, whole)
        self.accelerator.collectives.broadcast(whole, 0, self.group, tag="initial weights").wait()
        shard = self._cut_shard(region, whole)
        numel = region.numel if self.resident else region.shard_numel
        weights = memory.empty((numel,), dtype, tag="weights", shared=self.group)
        self.weights[region.name] = weights.copy_(whole if self.resident else shard)
        if region.trainable:
            owned = whole if self.plan.rules.update == "replicated" else shard
            if region.dtype != "float32" or self.plan.shards_apart:
                self.master[region.name] = memory.empty((owned.numel(),), torch.float32, tag="master").copy_(owned)
            moment_dtype = dtype_from_name(self.plan.moment_dtype_of(region))
            self.moments[region.name] = {
                key: memory.empty((owned.numel(),), moment_dtype, tag="optimizer").zero_()
                for key in MOMENTS[region.algorithm]
            }
        for placement in region.placements:
            parameter = self.parameters[placement.name]
            parameter.grad = None
            move_parameter(parameter, self._poisoned(placement, dtype))
            if self.resident:
                self.bind(placement, weights)
            else:
                self.unbind(placement)
        memory.release(whole)

    def _stage(self, region: Region, whole: Tensor) -> None:
        """Lay this rank's values of the region's parameters out in `whole`, which is on the device."""
        sources = {one.name: self.parameters[one.name].detach() for one in region.placements}
        for name, source in sources.items():
            if source.numel() > 1 and not any(source.stride()):
                raise ValueError(
                    f"the weights of {name!r} are not here: an engine that held them in shards was closed; "
                    "load the model's weights again before initialize"
                )
        devices = {source.device for source in sources.values()}
        elsewhere = devices.pop() if len(devices) == 1 and whole.device not in devices else whole.device
        target = whole if elsewhere == whole.device else torch.empty(whole.shape, dtype=whole.dtype, device=elsewhere)
        target.zero_()
        for placement in region.placements:
            target[placement.start : placement.stop].copy_(sources[placement.name].reshape(-1))
        if target is not whole:  # one transfer instead of one for each parameter
            whole.copy_(target)

    def _cut_shard(self, region: Region, whole: Tensor) -> Tensor:
        """This rank's part of a region, on the device."""
        if self.plan.rules.program == "free" or region.num_shards == 1:
            return own_part(region, whole, self.group)
        # On the device the offset would be part of the program, which then would not be that of the other ranks.
        start, stop = region.shard_bounds(self.group.rank)
        return self.accelerator.to_host(whole)[start:stop].to(self.accelerator.device)

    # -- binding parameters to bytes ---------------------------------------------------------------------------

    def bind(self, placement: Placement, whole: Tensor) -> None:
        """Let the parameter be its place in `whole`: a view where the backend has views, else a copy."""
        flat = whole[placement.start : placement.stop]
        if not self.accelerator.capabilities.views:
            flat = flat.clone()
        self.parameters[placement.name].data = flat.view(placement.shape)

    def unbind(self, placement: Placement) -> None:
        """The parameter's bytes are elsewhere: it keeps its shape, takes no memory, and reads as NaN."""
        parameter = self.parameters[placement.name]
        parameter.data = self._poisoned(placement, parameter.dtype)

    def _poisoned(self, placement: Placement, dtype: torch.dtype) -> Tensor:
        poison = self._poison.get(dtype)
        if poison is None:
            poison = torch.full((), float("nan"), dtype=dtype, device=self.accelerator.device)
            self._poison[dtype] = poison
        return poison.expand(placement.shape)

    def check_bindings(self) -> None:
        """Raise RuntimeError if the module was cast or moved: its parameters are not those of the plan any more."""
        for region in self.plan.regions:
            name = region.placements[0].name
            parameter = self.parameters[name]
            if dtype_name(parameter.dtype) != region.dtype or parameter.device != self.accelerator.device:
                raise RuntimeError(
                    f"parameter {name!r} has become {dtype_name(parameter.dtype)} on {parameter.device}, the plan has "
                    f"{region.dtype} on {self.accelerator.device}; cast and move the model before initialize"
                )

    def rebind_copies(self) -> None:
        """After an update on a backend without views: write the parameters from their regions."""
        if self.resident and not self.accelerator.capabilities.views:
            for region in self.plan.regions:
                for placement in region.placements:
                    self.bind(placement, self.weights[region.name])

    def masks(self, region: Region, use: str, choices: Sequence[Ranges]) -> list[Tensor]:
        """[elements owned] bool on the device for each choice of elements of the region. Data and no offsets, so that
        they are no part of the program. Kept until the same use of the region asks for others."""
        known = self._masks.get((region.name, use), {})
        self._masks[region.name, use] = {
            ranges: known[ranges] if ranges in known else self._make_mask(region, ranges) for ranges in choices
        }
        return [self._masks[region.name, use][ranges] for ranges in choices]

    def _make_mask(self, region: Region, ranges: Ranges) -> Tensor:
        first, stop = self.owned_bounds(region)
        mask = torch.zeros(stop - first, dtype=torch.bool)
        for start, end in ranges:
            mask[max(start - first, 0) : max(end - first, 0)] = True
        return mask.to(self.accelerator.device)

    # -- logical values ----------------------------------------------------------------------------------------

    def gather_owned(self, region: Region, owned: Tensor, tag: str) -> Tensor:
        """All ranks' `owned` parts of a region as one tensor [region.numel]. A collective, unless replicated."""
        if owned.numel() == region.numel:
            return owned.detach().clone()
        whole = torch.empty(region.numel, dtype=owned.dtype, device=owned.device)
        self.accelerator.collectives.all_gather(whole, owned.contiguous(), self.group, tag=tag).wait()
        return whole

    def named_values(self, key: str) -> Iterator[tuple[str, Tensor]]:
        """(name, host fp32 tensor in logical shape) of every parameter that has a `key`: `weight` or a moment. A
        collective."""
        for region in self.plan.regions:
            if key == WEIGHT or key in self.moment_keys(region):
                whole = self._whole_on_host(region, key)
                for placement in region.placements:
                    yield placement.name, whole[placement.start : placement.stop].view(placement.shape).clone()

    def moment_keys(self, region: Region) -> tuple[str, ...]:
        """What is kept of the region's gradients."""
        return MOMENTS[region.algorithm] if region.trainable else ()

    def read(self, name: str, key: str) -> Tensor:
        """One parameter's weight or moment: host, fp32, logical shape. A collective."""
        region, placement = self.plan.placement_by_name[name]
        whole = self._whole_on_host(region, key)
        return whole[placement.start : placement.stop].view(placement.shape).clone()

    def _whole_on_host(self, region: Region, key: str) -> Tensor:
        if key != WEIGHT:
            owned = self.moments[region.name][key]
        elif region.trainable:
            owned = self.owned_fp32(region)
        else:
            owned = self.weights[region.name]
        return self.accelerator.to_host(self.gather_owned(region, owned, tag="state")).to(torch.float32)

    def write(self, name: str, key: str, value: Tensor) -> None:
        """Set one parameter's weight or moment from a tensor in logical shape. Every rank writes its own part;
        whole weights on other ranks follow with `share_weights`."""
        region, placement = self.plan.placement_by_name[name]
        if tuple(value.shape) != placement.shape:
            raise ValueError(f"{key} of {name!r} has shape {tuple(value.shape)}, the model wants {placement.shape}")
        flat = value.detach().reshape(-1)
        if key == WEIGHT:
            bounds = (0, region.numel) if self.resident else region.shard_bounds(self.group.rank)
            _write_part(self.weights[region.name], bounds, placement, flat)
            if region.name in self.master:
                _write_part(self.master[region.name], self.owned_bounds(region), placement, flat)
        elif key in self.moment_keys(region):
            _write_part(self.moments[region.name][key], self.owned_bounds(region), placement, flat)

    def release(self) -> None:
        """Give all memory back; parameters keep ordinary tensors of their last resident weights."""
        memory = self.accelerator.memory
        for region in self.plan.regions:
            for placement in region.placements:
                parameter = self.parameters[placement.name]
                parameter.data = parameter.data.clone() if self.resident else parameter.data
            for tensor in (
                self.weights.pop(region.name),
                self.master.pop(region.name, None),
                *self.moments.pop(region.name, {}).values(),
            ):
                if tensor is not None:
                    memory.release(tensor)


def own_part(region: Region, whole: Tensor, group: Group) -> Tensor:
    """This rank's part of a whole region, aliasing it."""
    if region.num_shards == 1:
        return whole
    start, stop = region.shard_bounds(group.rank)
    return whole[start:stop]


def _write_part(target: Tensor, bounds: tuple[int, int], placement: Placement, flat: Tensor) -> None:
    """target covers `bounds` of the region: write the elements of the placement that fall inside."""
    start, stop = max(bounds[0], placement.start), min(bounds[1], placement.stop)
    if start < stop:
        target[start - bounds[0] : stop - bounds[0]].copy_(flat[start - placement.start : stop - placement.start])
