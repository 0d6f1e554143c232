"""Learning-rate schedules with DeepSpeed's names, keys, defaults and values.

Which rate applies when. Building a schedule writes its starting values into the parameter groups at once, and each
`Schedule.step()` after an optimizer step writes the next ones. Iteration -1 is the start and iteration k is the state
after k + 1 calls, so optimizer step n (counted from 1) runs with the values of iteration n - 2:

- step 1 uses the starting values: `warmup_min_lr` (WarmupLR, WarmupDecayLR), 0 (WarmupCosineLR, whatever
  `warmup_min_ratio` says), `cycle_min_lr` (OneCycle), `lr_range_test_min_lr` (LRRangeTest);
- step 2 uses iteration 0, where both kinds of warmup are still at their lower end, so that WarmupLR and WarmupDecayLR
  spend two steps on `warmup_min_lr`; OneCycle and LRRangeTest have already moved.

A skipped optimizer step must not be followed by `Schedule.step()`.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, Protocol

import torch

from windlass.core.schedule_rules import SCHEDULES, GroupValues, ScheduleRule, single_rates, whole_number

__all__ = ["SCHEDULES", "Schedule", "build_schedule", "single_rates"]

logger = logging.getLogger(__name__)


class HasParamGroups(Protocol):
    """What a schedule needs of an optimizer: groups with an `lr` each, and `betas` where momentum is to be cycled."""

    @property
    def param_groups(self) -> Sequence[MutableMapping[str, Any]]: ...


class Schedule:
    """Writes a rule's values into an optimizer's parameter groups; used like a `torch.optim.lr_scheduler`.

    Starting values are written at once. A group's `lr` that is a tensor is filled in place, and `betas` are written
    only to groups that have them. A group may have an `lr_ratio`: a rate that the rule gives for all groups is
    multiplied with it, one of a list for each group is not.
    """

    def __init__(self, optimizer: HasParamGroups, rule: ScheduleRule) -> None:
        self.optimizer = optimizer
        self.rule = rule.for_ratios([float(group.get("lr_ratio", 1.0)) for group in optimizer.param_groups])
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.last_batch_iteration = -1
        values = self._write()
        if any(value.betas for value in values) and not any("betas" in group for group in optimizer.param_groups):
            logger.warning("scheduler %s: no parameter group has betas, so momentum is not cycled", type(rule).__name__)

    def step(self) -> None:
        """Move on by one iteration: call once after each optimizer step that was not skipped."""
        self.last_batch_iteration += 1
        self._write()

    def get_last_lr(self) -> list[float]:
        """The rate of each parameter group as last written, for the optimizer step that comes next."""
        return list(self._last_lr)

    def state_dict(self) -> dict[str, Any]:
        """All that a fresh schedule with the same parameters needs to go on; plain JSON values."""
        return {
            "type": type(self.rule).__name__,
            "last_batch_iteration": self.last_batch_iteration,
            "base_lrs": list(self.base_lrs),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, and write its values into the parameter groups.

        Takes DeepSpeed's state too, which holds `last_batch_iteration` alone. Raises ValueError for the state of
        another type of schedule or of another number of groups, and leaves this schedule as it was.
        """
        name = type(self.rule).__name__
        if state.get("type", name) != name:
            raise ValueError(f"scheduler {name} cannot go on from the state of {state['type']}: configure that type")
        iteration, base_lrs = state.get("last_batch_iteration"), state.get("base_lrs", self.base_lrs)
        kind = whole_number(-1)
        if not kind.accepts(iteration):
            raise ValueError(
                f"scheduler {name}: last_batch_iteration in the state must be {kind.wanted}, got {iteration!r}"
            )
        if not isinstance(base_lrs, list) or len(base_lrs) != len(self.base_lrs):
            wanted = f"{len(self.base_lrs)} numbers, one for each parameter group"
            raise ValueError(f"scheduler {name}: base_lrs in the state must be {wanted}, got {base_lrs!r}")
        self.last_batch_iteration = int(state["last_batch_iteration"])
        self.base_lrs = [float(lr) for lr in base_lrs]
        self._write()

    def _write(self) -> list[GroupValues]:
        groups = self.optimizer.param_groups
        if len(groups) != len(self.base_lrs):
            raise ValueError(
                f"scheduler {type(self.rule).__name__} was built for {len(self.base_lrs)} parameter groups and the "
                f"optimizer now has {len(groups)}; build it again after adding groups"
            )
        values = self.rule.at(self.last_batch_iteration, self.base_lrs)
        for group, value in zip(groups, values, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(value.lr)
            else:
                group["lr"] = value.lr
            if value.betas is not None and "betas" in group:
                group["betas"] = value.betas
        self._last_lr = [value.lr for value in values]
        return values


def build_schedule(optimizer: HasParamGroups, type: str, params: Mapping[str, object]) -> Schedule:
    """Build the schedule that a config's `scheduler` section names, and write its starting values.

    Raises ValueError for an unknown type, an unknown, missing or ill-formed parameter, and for a list whose length is
    not the number of parameter groups; the optimizer is then untouched.
    """
    if type not in SCHEDULES:
        known = f"known: {', '.join(SCHEDULES)}; any other kind can be passed as an object"
        raise ValueError(f"no scheduler type {type!r} ({known}){_did_you_mean(type, SCHEDULES)}")
    rule_class: Callable[..., ScheduleRule] = SCHEDULES[type]
    keys = {item.name: item for item in fields(SCHEDULES[type])}
    for key in params:
        if key not in keys:
            known = f"known: {', '.join(keys)}"
            raise ValueError(f"scheduler {type} has no parameter {key!r} ({known}){_did_you_mean(key, keys)}")
    missing = [key for key, item in keys.items() if item.default is MISSING and key not in params]
    if missing:
        raise ValueError(f"scheduler {type} needs {' and '.join(missing)} in its params, got {dict(params)!r}")
    return Schedule(optimizer, rule_class(**params))


def _did_you_mean(got: str, known: Iterable[str]) -> str:
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(got.lower(), by_lower, n=1)
    return f", did you mean {by_lower[close[0]]!r}?" if close else ""
