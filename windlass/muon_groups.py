"""Which parameters Muon updates, as which matrices: by the modules' roles, unless the user says otherwise.

What overrides what, strongest first: `muon.roles` in the configuration, the first name pattern that fits; `use_muon`
of a parameter group; `use_muon` of the parameter itself, as DeepSpeed reads it; the role. Row splits: `muon.views`,
the first name pattern that fits; `matrix_views` of a module, {name of a parameter inside it: row splits}, where an
outer module overrides an inner one; what a module of torch.nn is known to be made of; one matrix. A parameter with
several names answers to all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from windlass.config import Config
from windlass.config_models import MuonConfig, MuonParams
from windlass.core.matrices import MUON_ROLES, find_matrices, matrix_shape
from windlass.core.schedules import SCHEDULES, single_rates
from windlass.core.specs import ParamSpec, describe_model

_OF_MUON = ("momentum", "muon_lr")
_OF_ADAMW = ("betas", "eps", "adam_lr")


@dataclass(frozen=True)
class _Known:
    """One parameter of the model: its spec, and all its names."""

    spec: ParamSpec
    names: tuple[str, ...]


def split_groups(
    module: nn.Module, chosen: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]], config: Config
) -> list[dict[str, Any]]:
    """Parameter groups with an `algorithm` each: every given group in two, Muon's first, unless one half is empty.

    A given group's settings go to both halves, but those that only one algorithm knows; `lr` is for both, unless the
    group has a `muon_lr` or `adam_lr`. Each half has an `lr_ratio`, which the rates of a schedule keep. Raises
    ValueError if Muon has nothing to do, or is to do what it cannot.
    """
    known = _know_parameters(module)
    _check_patterns(config.muon, known.values())
    groups: list[dict[str, Any]] = []
    by_muon: list[_Known] = []
    for given in _as_groups(chosen):
        halves: dict[str, list[nn.Parameter]] = {"muon": [], "adamw": []}
        for parameter in given["params"]:
            one = known.get(id(parameter))
            if one is not None and wants_muon(one.spec, one.names, parameter, given.get("use_muon"), config.muon):
                halves["muon"].append(parameter)
                by_muon.append(one)
            else:
                halves["adamw"].append(parameter)
        groups += [
            {"params": parameters, **_settings(algorithm, given, config)}
            for algorithm, parameters in halves.items()
            if parameters
        ]
    if not by_muon:
        raise ValueError(
            f"Muon was chosen, but none of the model's {len(known)} parameters is a matrix that it is for; choose "
            "AdamW, or name parameters in muon.roles"
        )
    _check_views(config.muon, by_muon)
    return groups


def _know_parameters(module: nn.Module) -> dict[int, _Known]:
    """By id."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    specs = {spec.name: spec for spec in describe_model(module)[0] if spec.tied_to is None}
    known = {}
    for key, own in names.items():
        spec = next(specs[name] for name in own if name in specs)
        known[key] = _Known(spec, tuple(own))
    return known


def _as_groups(chosen: Iterable[Any]) -> list[Mapping[str, Any]]:
    listed = list(chosen)
    if listed and isinstance(listed[0], Mapping):
        for index, group in enumerate(listed):
            if "algorithm" in group:
                raise ValueError(
                    f"parameter group {index} has an 'algorithm', which follows from the parameters' roles; give it "
                    "use_muon=True or use_muon=False instead"
                )
        return [{**group, "params": _listed(group["params"])} for group in listed]
    return [{"params": _listed(listed)}]


def _listed(parameters: Any) -> list[nn.Parameter]:
    """Of what torch takes as the parameters of a group: one, several, or several with names."""
    several = [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)
    return [one[1] if isinstance(one, tuple) else one for one in several]


def _settings(algorithm: str, given: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """One half of a group, without its parameters."""
    params = config.optimizer.params
    assert isinstance(params, MuonParams)
    by_muon = algorithm == "muon"
    rate = "muon_lr" if by_muon else "adam_lr"
    defaults: dict[str, Any] = {"momentum": params.momentum}
    if not by_muon:
        defaults = {"betas": params.betas, "eps": params.eps, "decoupled": True}
    left_out = {"params", "use_muon", rate, *(_OF_ADAMW if by_muon else _OF_MUON)}
    own = {name: value for name, value in given.items() if name not in left_out}
    lr = given.get(rate, given.get("lr", getattr(params, rate)))
    base = float(given.get("lr", params.lr))
    return {
        "algorithm": algorithm,
        "weight_decay": params.weight_decay,
        **defaults,
        **own,
        "lr": lr,
        "lr_ratio": _ratio(float(lr), base, config),
    }


def _ratio(rate: float, base: float, config: Config) -> float:
    """What a schedule's rate for all groups is multiplied with: it stands for the `lr` of both halves."""
    if rate == base:
        return 1.0
    if base:
        return rate / base
    scheduler = config.scheduler
    if scheduler is not None and (names := single_rates(SCHEDULES[scheduler.type], scheduler.params)):
        raise ValueError(
            f"a parameter group with a learning rate of {rate:g} beside an lr of 0 has no ratio that "
            f"scheduler.params.{names[0]} = {scheduler.params.get(names[0])} could keep; give an lr, or a list of "
            "rates with one for each group"
        )
    return 1.0


def wants_muon(
    spec: ParamSpec, names: Sequence[str], parameter: nn.Parameter, group_says: bool | None, muon: MuonConfig
) -> bool:
    """Whether Muon updates this parameter. Raises ValueError if it should by what the user says, and cannot."""
    pattern = _first_fitting(muon.roles, names)
    said = [muon.roles[pattern] == "muon"] if pattern is not None else []
    said += [bool(value) for value in (group_says, getattr(parameter, "use_muon", None)) if value is not None]
    if not said:
        return spec.role in MUON_ROLES and spec.numel > 0
    if said[0]:
        matrix_shape(spec)  # raises for what is no matrix
    return said[0] and spec.numel > 0


def _first_fitting(patterns: Iterable[str], names: Sequence[str]) -> str | None:
    return next((pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)), None)


def _check_patterns(muon: MuonConfig, known: Iterable[_Known]) -> None:
    names = [name for one in known for name in one.names]
    for key, patterns in (("roles", muon.roles), ("views", muon.views)):
        for pattern in patterns:
            if _first_fitting((pattern,), names) is None:
                raise ValueError(
                    f"muon.{key} has the pattern {pattern!r}, which fits no parameter of the model; names are those of "
                    f"module.named_parameters(), for example {names[0] if names else ''!r}"
                )


def _check_views(muon: MuonConfig, by_muon: Sequence[_Known]) -> None:
    names = [name for one in by_muon for name in one.names]
    for pattern in muon.views:
        if _first_fitting((pattern,), names) is None:
            raise ValueError(
                f"muon.views has the pattern {pattern!r}, which fits only parameters that AdamW updates, and those are "
                "not split; remove it, or name them in muon.roles"
            )


def assign_matrices(
    specs: Sequence[ParamSpec], groups: Sequence[Mapping[str, Any]], module: nn.Module, config: Config
) -> tuple[ParamSpec, ...]:
    """The specs with the algorithm of their group, and the row splits of what Muon updates. Raises ValueError for row
    splits that do not add up."""
    declared = declared_views(module)
    names: dict[str, list[str]] = defaultdict(list)
    for spec in specs:
        names[spec.tied_to or spec.name].append(spec.name)
    assigned = []
    for spec in specs:
        if spec.trainable and groups[spec.group].get("algorithm") == "muon":
            views = _views_of(spec, names[spec.tied_to or spec.name], declared, config.muon)
            spec = replace(spec, algorithm="muon", views=views)
            find_matrices(spec)
        assigned.append(spec)
    return tuple(assigned)


def declared_views(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameter name -> row splits, as the modules declare them; an outer module overrides an inner one. Raises
    ValueError for a name that the declaring module does not have."""
    found: dict[str, tuple[int, ...]] = {}
    known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for path, inner in reversed(list(module.named_modules())):
        prefix = f"{path}." if path else ""
        if isinstance(inner, nn.MultiheadAttention) and inner.in_proj_weight is not None:
            found[f"{prefix}in_proj_weight"] = (inner.embed_dim,) * 3
        if isinstance(inner, nn.modules.conv._ConvNd) and inner.groups > 1:
            # Each group of channels has a kernel of its own.
            found[f"{prefix}weight"] = (inner.weight.shape[0] // inner.groups,) * inner.groups
        for name, splits in getattr(inner, "matrix_views", {}).items():
            if prefix + name not in known:
                raise ValueError(
                    f"matrix_views of {type(inner).__name__} {path!r} names {name!r}, which is no parameter inside it; "
                    "names are those of its named_parameters()"
                )
            found[prefix + name] = tuple(splits)
    return found


def _views_of(
    spec: ParamSpec, names: Sequence[str], declared: Mapping[str, tuple[int, ...]], muon: MuonConfig
) -> tuple[int, ...]:
    pattern = _first_fitting(muon.views, names)
    if pattern is None:
        return next((declared[name] for name in names if name in declared), ())
    splits = muon.views[pattern]
    return _equal_parts(spec, splits) if isinstance(splits, int) else splits


def _equal_parts(spec: ParamSpec, count: int) -> tuple[int, ...]:
    _, rows, _ = matrix_shape(spec)
    if count < 1 or rows % count:
        raise ValueError(
            f"muon.views splits {spec.name!r} of shape {spec.shape} into {count} equal parts, which its {rows} rows do "
            "not divide into; give a divisor, or the rows of each part as a list"
        )
    return (rows // count,) * count
