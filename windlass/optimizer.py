"""Parameter groups: what a user passes as optimizer, parameters or scheduler, as settings for the core's update."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from windlass.config import Config
from windlass.config_models import MuonParams
from windlass.core.adamw import AdamWSettings
from windlass.core.encoding import decode, encode
from windlass.core.muon import MuonSettings
from windlass.core.schedules import build_schedule
from windlass.muon_groups import split_groups

# Options of torch's Adam and AdamW that change the arithmetic and that the update kernel does not have.
_UNSUPPORTED = ("amsgrad", "maximize")


class PlannedOptimizer(torch.optim.Optimizer):
    """Carries parameter groups, so that any scheduler can drive them. The engine's plan does the update."""

    # torch wraps this method so that its compiler leaves it alone, and imports the compiler for that, which takes 3 s.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Called by the engine after each update, to keep torch's schedulers in step; does nothing itself."""
        return None if closure is None else closure()


def build_optimizer(
    module: nn.Module,
    config: Config,
    parameters: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]] | None,
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None,
) -> torch.optim.Optimizer:
    """The optimizer whose groups rule: the user's own (torch Adam or AdamW), or one made from the configuration."""
    chosen = list(module.parameters()) if parameters is None else list(parameters)
    if optimizer is not None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = optimizer(chosen)
        _check_optimizer(optimizer, config)
        _check_parameters(module, optimizer)
        return optimizer
    if not chosen:
        raise ValueError("the model has no parameters, so there is nothing to train; pass a module that has some")
    given = config.optimizer.params
    if isinstance(given, MuonParams):
        made = PlannedOptimizer(cast(Any, split_groups(module, cast(Any, chosen), config)), {})
        _check_parameters(module, made)
        return made
    defaults = {
        "lr": given.lr,
        "betas": given.betas,
        "eps": given.eps,
        "weight_decay": given.weight_decay,
        "decoupled": given.decoupled,
    }
    made = PlannedOptimizer(cast(Any, chosen), defaults)
    _check_parameters(module, made)
    return made


def _check_optimizer(optimizer: torch.optim.Optimizer, config: Config) -> None:
    if isinstance(optimizer, torch.optim.Muon):
        raise ValueError(
            "torch.optim.Muon keeps whole matrices on every rank, so it is planned here instead; leave optimizer out "
            'and put {"optimizer": {"type": "Muon", "params": {"lr": ...}}} into the configuration, which covers all '
            "parameters, matrices and others"
        )
    by_muon = any(group.get("algorithm") == "muon" for group in optimizer.param_groups)
    if by_muon is not (config.optimizer.type == "muon"):
        said = "says Muon" if config.optimizer.type == "muon" else f"says {config.optimizer.type}"
        raise ValueError(
            f"the configuration {said}, and the optimizer that was passed, {type(optimizer).__name__}, "
            f"{'has' if by_muon else 'does not have'} groups for Muon; leave optimizer out, or change optimizer.type"
        )
    if isinstance(optimizer, PlannedOptimizer):
        return
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise ValueError(
            f"optimizer {type(optimizer).__name__} is not supported yet; pass torch.optim.AdamW or torch.optim.Adam, "
            "or leave it out and use the configuration, which also knows Muon"
        )
    for group in optimizer.param_groups:
        for option in _UNSUPPORTED:
            if group.get(option):
                raise ValueError(
                    f"optimizer {type(optimizer).__name__} with {option}=True is not supported; turn it off"
                )


def _check_parameters(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    own = {id(parameter) for parameter in module.parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in own:
                raise ValueError(
                    f"parameter group {index} holds a parameter of shape {tuple(parameter.shape)} that is not in the "
                    "model; pass parameters of the same module"
                )


def group_of_parameters(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """id(parameter) -> index of its group."""
    return {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}


def read_settings(optimizer: torch.optim.Optimizer) -> list[AdamWSettings | MuonSettings]:
    """What each group says now: read anew for every step, since schedulers write into the groups."""
    settings: list[AdamWSettings | MuonSettings] = []
    for group in optimizer.param_groups:
        if group.get("algorithm") == "muon":
            lr, momentum, decay = (float(group[key]) for key in ("lr", "momentum", "weight_decay"))
            settings.append(MuonSettings(lr, momentum, decay))
            continue
        decoupled = group.get("decoupled", group.get("decoupled_weight_decay"))
        if decoupled is None:
            decoupled = isinstance(optimizer, torch.optim.AdamW)
        beta1, beta2 = group["betas"]
        settings.append(
            AdamWSettings(
                lr=float(group["lr"]),
                betas=(float(beta1), float(beta2)),
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
                decoupled=bool(decoupled),
            )
        )
    return settings


def build_scheduler(config: Config, optimizer: torch.optim.Optimizer, given: Any) -> Any:
    """The scheduler that drives the groups: the user's own, one made by the user's function, or the configuration's."""
    if given is None:
        section = config.scheduler
        return None if section is None else build_schedule(optimizer, section.type, section.params)
    makes = isinstance(given, type) or not hasattr(given, "step")
    made = given(optimizer) if makes else given
    if isinstance(made, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau needs a metric at every step, which engine.step() does not have; call its step(metric) "
            "yourself, on engine.optimizer, and leave lr_scheduler out"
        )
    if getattr(made, "optimizer", optimizer) is not optimizer:
        raise ValueError(
            "lr_scheduler drives another optimizer than the engine's; pass that optimizer too, or pass a function that "
            "makes the scheduler of the optimizer it is given"
        )
    return made


def save_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups' settings, JSON-ready; a learning rate may be a tensor."""

    def plain(value: Any) -> Any:
        return encode(float(value) if isinstance(value, torch.Tensor) else value)

    return [{key: plain(item) for key, item in group.items() if key != "params"} for group in optimizer.param_groups]


def load_groups(optimizer: torch.optim.Optimizer, saved: Iterable[Mapping[str, Any]]) -> None:
    """Take over the saved settings, for the keys that the groups have."""
    for group, values in zip(optimizer.param_groups, saved, strict=False):
        group.update({key: decode(value) for key, value in values.items() if key in group})
