"""What the planner knows of a model: parameter specs and units, read from modules, never from name patterns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from windlass.core.roles import Role as Role  # a spec's users find it here
from windlass.core.roles import find_roles

# Containers whose forward is never called, or may be bypassed by indexing: their children are called instead.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# Containers of bare parameters: what they hold is used by the module that owns them.
_PARAMETER_CONTAINERS = (nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class ParamSpec:
    """One parameter name. A tied name has a spec of its own, with `tied_to` naming the one that owns the bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # "float32", "bfloat16", ...
    role: Role
    unit: str
    trainable: bool = True
    tied_to: str | None = None
    views: tuple[int, ...] = ()  # row splits of a fused matrix (q|k|v, gate|up); empty: one matrix
    group: int = 0  # index of the optimizer group
    algorithm: str = "adamw"  # or "muon": what updates it

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class UnitSpec:
    """Parameters that are gathered and reduced together, and the module whose calls say when.

    `users` are the modules (paths) that read parameters of this unit; the first one is the unit's own module.
    `spans` is true when other units are called while this one is in use, or when several units' modules
    share a parameter of it: it then needs memory of its own.
    """

    name: str
    users: tuple[str, ...]
    spans: bool


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    """torch.float32 for "float32"."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"there is no dtype named {name!r}")
    return dtype


def _planned_dtype(parameter: nn.Parameter, target: str | None) -> str:
    return target if target is not None and parameter.is_floating_point() else dtype_name(parameter.dtype)


@dataclass(frozen=True)
class _Found:
    """One unit while the module tree is walked."""

    path: str
    module: nn.Module
    whole: bool  # the whole subtree, or only the parameters held directly


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _walk(module: nn.Module, path: str, repeated: bool) -> Iterator[_Found]:
    """Find units: every element of a repeated stack is one; outside of stacks, every module with parameters."""
    inner = [(name, child) for name, child in module.named_children() if _holds_parameters(child)]
    inner = [(name, child) for name, child in inner if not isinstance(child, _PARAMETER_CONTAINERS)]
    container = isinstance(module, _CONTAINERS)
    # MultiheadAttention reads its output projection's weight itself, without calling that module.
    whole = repeated or not inner or isinstance(module, nn.MultiheadAttention)
    if whole and not container:
        yield _Found(path, module, whole=True)
        return
    direct = any(True for _ in module.parameters(recurse=False)) or any(
        isinstance(child, _PARAMETER_CONTAINERS) and _holds_parameters(child) for child in module.children()
    )
    if direct:
        yield _Found(path, module, whole=False)
    stack = container and len(inner) > 1
    for name, child in inner:
        yield from _walk(child, f"{path}.{name}" if path else name, stack)


def _unit_parameters(found: _Found) -> Iterator[tuple[str, nn.Parameter]]:
    prefix = f"{found.path}." if found.path else ""
    if found.whole:
        for name, parameter in found.module.named_parameters(remove_duplicate=False):
            yield prefix + name, parameter
        return
    for name, parameter in found.module.named_parameters(recurse=False, remove_duplicate=False):
        yield prefix + name, parameter
    for child_name, child in found.module.named_children():
        if isinstance(child, _PARAMETER_CONTAINERS):
            for name, parameter in child.named_parameters(remove_duplicate=False):
                yield f"{prefix}{child_name}.{name}", parameter


def describe_model(
    module: nn.Module, groups: Mapping[int, int] | None = None, *, dtype: str | None = None
) -> tuple[tuple[ParamSpec, ...], tuple[UnitSpec, ...]]:
    """Specs of all parameters and the units they form, in order of definition.

    `groups` maps `id(parameter)` to the index of its optimizer group; parameters that are absent are not trained
    (None: one group of all). The ids are used here only: everything behind this function goes by name. `dtype` is
    what floating parameters will be cast to.
    """
    roles = find_roles(module)
    owners: dict[int, str] = {}
    specs: list[ParamSpec] = []
    unit_of: dict[str, str] = {}
    found_units = list(_walk(module, "", repeated=False))
    readers: dict[str, list[str]] = {found.path: [found.path] for found in found_units}
    shared: set[str] = set()
    for found in found_units:
        for name, parameter in _unit_parameters(found):
            canonical = owners.setdefault(id(parameter), name)
            unit = unit_of.setdefault(canonical, found.path)
            if unit != found.path:
                readers[unit].append(found.path)
                shared.add(unit)
            specs.append(
                ParamSpec(
                    name=name,
                    shape=tuple(parameter.shape),
                    dtype=_planned_dtype(parameter, dtype),
                    role=roles[name],
                    unit=unit,
                    trainable=parameter.requires_grad and (groups is None or id(parameter) in groups),
                    tied_to=None if canonical == name else canonical,
                    group=0 if groups is None else groups.get(id(parameter), 0),
                )
            )
    # A module in several places has one unit; its other names are ties.
    known = {spec.name for spec in specs}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name not in known:
            first = next(spec for spec in specs if spec.name == owners[id(parameter)])
            specs.append(replace(first, name=name, tied_to=first.name))
    owning = {spec.unit for spec in specs if spec.tied_to is None}
    units = tuple(
        UnitSpec(found.path, tuple(dict.fromkeys(readers[found.path])), spans=not found.whole or found.path in shared)
        for found in found_units
        if found.path in owning
    )
    return tuple(specs), units
