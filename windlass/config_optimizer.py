"""The optimizer and the schedule of a configuration, completed and checked against each other."""

from __future__ import annotations

import copy
import inspect
from typing import Literal

from windlass.config_errors import quote, suggest
from windlass.config_keys import SortedKeys
from windlass.config_models import (
    AdamParams,
    GivenAdamParams,
    GivenConfig,
    GivenMuonParams,
    GivenScheduler,
    MuonConfig,
    MuonParams,
    OptimizerConfig,
    SchedulerConfig,
)
from windlass.deepspeed_keys import SCHEDULERS_DONE


def resolve_optimizer(given: GivenConfig, scheduler: SchedulerConfig | None, keys: SortedKeys) -> OptimizerConfig:
    """Fill in defaults. What contradicts itself goes to `keys.problems`, what is worth a line to `keys.notes`."""
    optimizer = given.optimizer
    if optimizer is not None and isinstance(optimizer.params, GivenMuonParams):
        params = _resolve_muon_params(optimizer.params, keys)
        _check_form(given.muon, optimizer.params, keys)
        _check_rates(optimizer.params, params, scheduler, keys)
        if "scale" not in given.muon.model_fields_set:
            keys.notes.append(
                'info: muon.scale is not given and is "rms", for which learning rates and decay are those of AdamW '
                '(DeepSpeed\'s Muon scales as "original" does)'
            )
        return OptimizerConfig(type="muon", params=params)
    if given.muon.model_fields_set:
        keys.notes.append('warning: muon has no effect without "type": "Muon" in optimizer')
    if optimizer is None:
        return OptimizerConfig()
    assert isinstance(optimizer.params, GivenAdamParams)
    return _resolve_adam(optimizer.type, optimizer.params, keys)


def resolve_muon(given: GivenConfig) -> MuonConfig:
    """The section `muon`, with what `optimizer.params` says about it."""
    params = given.optimizer.params if given.optimizer is not None else None
    if isinstance(params, GivenMuonParams) and params.ns_method is not None:
        return given.muon.model_copy(update={"ns_method": params.ns_method})
    return given.muon


def _resolve_adam(type: str, given: GivenAdamParams, keys: SortedKeys) -> OptimizerConfig:
    kind: Literal["adam", "adamw"] = "adam" if type.lower() == "adam" else "adamw"
    if kind == "adamw" and not given.adam_w_mode:
        keys.notes.append('warning: optimizer.params.adam_w_mode = false has no effect on "AdamW", use "Adam"')
    weight_decay = given.weight_decay
    if weight_decay is None:
        weight_decay = 0.0 if kind == "adam" else _default_decay("AdamW", keys)
    params = AdamParams(
        lr=given.lr,
        betas=given.betas,
        eps=given.eps,
        weight_decay=weight_decay,
        decoupled=kind == "adamw" or given.adam_w_mode,
    )
    return OptimizerConfig(type=kind, params=params)


def _default_decay(name: str, keys: SortedKeys) -> float:
    keys.notes.append(
        "info: optimizer.params.weight_decay is not given and is 0.01, the default of torch.optim.AdamW "
        f"(DeepSpeed's own {name} takes 0)"
    )
    return 0.01


def _resolve_muon_params(given: GivenMuonParams, keys: SortedKeys) -> MuonParams:
    """`muon_lr` and `adam_lr` are `lr` unless they are given; if they are one and `lr` is not, it is that one."""
    alike = given.muon_lr is not None and given.muon_lr == given.adam_lr
    return MuonParams(
        lr=given.muon_lr if alike and given.muon_lr and "lr" not in given.model_fields_set else given.lr,
        muon_lr=given.lr if given.muon_lr is None else given.muon_lr,
        adam_lr=given.lr if given.adam_lr is None else given.adam_lr,
        momentum=given.momentum,
        betas=given.betas,
        eps=given.eps,
        weight_decay=_default_decay("Muon", keys) if given.weight_decay is None else given.weight_decay,
    )


def _check_form(muon: MuonConfig, params: GivenMuonParams, keys: SortedKeys) -> None:
    one, other = params.ns_method, muon.ns_method
    if one is not None and "ns_method" in muon.model_fields_set and one != other:
        keys.problems.append(
            f"optimizer.params.ns_method = {quote(one)} contradicts muon.ns_method = {quote(other)}, remove one of them"
        )
    if muon.ns_dtype == "bf16" and "gram" in (one, other):
        keys.problems.append(
            'ns_method = "gram" is not safe with muon.ns_dtype = "bf16", whose rounding errors it lifts to singular '
            'values, set muon.ns_dtype to "fp32" or "fp16", or leave it out'
        )


def _check_rates(
    given: GivenMuonParams, params: MuonParams, scheduler: SchedulerConfig | None, keys: SortedKeys
) -> None:
    """Where a schedule writes one rate for all groups, that stands for `lr`, and Muon's and AdamW's keep their ratio
    to it. Without an `lr` nobody can tell which of the two is meant."""
    if scheduler is None or params.muon_lr == params.adam_lr == params.lr:
        return
    from windlass.core.schedules import SCHEDULES, single_rates  # here, because it imports torch

    names = [f"scheduler.params.{name}" for name in single_rates(SCHEDULES[scheduler.type], scheduler.params)]
    if not names:
        return
    listed, rates = " and ".join(names), f"muon_lr = {params.muon_lr:g} and adam_lr = {params.adam_lr:g}"
    if "lr" not in given.model_fields_set or params.lr == 0:
        keys.problems.append(
            f"{listed} may stand for {rates} alike, add the optimizer.params.lr that the schedule's rates stand for, "
            "or give a list [Muon's, AdamW's] instead of each"
        )
        return
    muon, adam = params.muon_lr / params.lr, params.adam_lr / params.lr
    keys.notes.append(
        f"info: by {listed} optimizer.params.lr = {params.lr:g} is meant, Muon's rates are {muon:g} times and AdamW's "
        f"{adam:g} times the schedule's"
    )


def resolve_scheduler(given: GivenScheduler | None, keys: SortedKeys) -> SchedulerConfig | None:
    """Check the schedule's parameters against its rule; None if there is no schedule or it is wrong."""
    if given is None or (given.type is None and not given.params):
        return None
    if given.type is None:
        if "scheduler.type" not in keys.auto:
            keys.problems.append('scheduler.type is missing, add "type": "WarmupLR"')
        return None
    if given.type not in SCHEDULERS_DONE:
        known = ", ".join(quote(name) for name in SCHEDULERS_DONE)
        advice = suggest(given.type, SCHEDULERS_DONE, quoting='"') or ", pass any other schedule as lr_scheduler="
        keys.problems.append(f"scheduler.type = {quote(given.type)} is not one of {known}{advice}")
        return None
    from windlass.core.schedules import SCHEDULES  # here, because it imports torch

    rule = SCHEDULES[given.type]
    accepted = inspect.signature(rule).parameters
    unknown = [name for name in given.params if name not in accepted]
    for name in unknown:
        hint = suggest(name, accepted) or f", it knows {', '.join(accepted)}"
        keys.problems.append(f"unknown key 'scheduler.params.{name}' for {given.type}{hint}")
    missing = [
        name
        for name, parameter in accepted.items()
        if parameter.default is inspect.Parameter.empty and name not in given.params
    ]
    for name in missing:
        keys.problems.append(f"scheduler.params.{name} is missing, {given.type} needs it")
    if unknown or missing:
        return None
    try:
        rule(**given.params)
    except ValueError as error:
        keys.problems.append(str(error))
        return None
    return SchedulerConfig.model_validate({"type": given.type, "params": copy.deepcopy(given.params)})
