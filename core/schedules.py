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
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Protocol, TypeAlias

import torch

logger = logging.getLogger(__name__)

PerGroup: TypeAlias = float | tuple[float, ...]
"""One value for every parameter group, or one for each."""


class HasParamGroups(Protocol):
    """What a schedule needs of an optimizer: groups with an `lr` each, and `betas` where momentum is to be cycled."""

    @property
    def param_groups(self) -> Sequence[MutableMapping[str, Any]]: ...


@dataclass(frozen=True)
class GroupValues:
    """What a schedule sets in one parameter group; `betas` of None leaves the group's momentum alone."""

    lr: float
    betas: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Kind:
    """What a parameter may be: the words for an error message, the test, and the form in which it is kept."""

    wanted: str
    accepts: Callable[[Any], bool]
    keep: Callable[[Any], object] = lambda value: value

    def or_none(self) -> _Kind:
        accepts, keep = self.accepts, self.keep
        wanted = f"{self.wanted}, or null"
        return _Kind(
            wanted, lambda value: value is None or accepts(value), lambda value: None if value is None else keep(value)
        )

    def per_group(self) -> _Kind:
        accepts, keep = self.accepts, self.keep
        return _Kind(
            f"{self.wanted}, or a list of them with one for each parameter group",
            lambda value: all(map(accepts, value)) if isinstance(value, list | tuple) else accepts(value),
            lambda value: tuple(map(keep, value)) if isinstance(value, list | tuple) else keep(value),
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(least: int) -> _Kind:
    # JSON's 1e3 arrives as the float 1000.0 and means the count 1000.
    wanted = f"a whole number of at least {least}"
    return _Kind(wanted, lambda value: _is_number(value) and value == int(value) >= least, int)


_NUMBER = _Kind("a finite number", _is_number, float)
_NOT_NEGATIVE = _Kind("a finite number of at least 0", lambda value: _is_number(value) and value >= 0, float)
_MOMENTUM = _Kind("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1, float)
_BOOLEAN = _Kind("true or false", lambda value: isinstance(value, bool))
_WARMUP_TYPE = _Kind("'log' or 'linear'", lambda value: isinstance(value, str) and value in ("log", "linear"))


def _is(kind: _Kind) -> dict[str, _Kind]:
    return {"kind": kind}


@dataclass(frozen=True, kw_only=True)
class ScheduleRule(ABC):
    """A schedule as a pure function of the iteration; its fields are the keys of the config's `scheduler.params`.

    A field that is out of range raises ValueError when the rule is built.
    """

    def __post_init__(self) -> None:
        for item in fields(self):
            kind: _Kind = item.metadata["kind"]
            value = getattr(self, item.name)
            if not kind.accepts(value):
                raise ValueError(f"scheduler {type(self).__name__}: {item.name} must be {kind.wanted}, got {value!r}")
            object.__setattr__(self, item.name, kind.keep(value))

    @abstractmethod
    def at(self, iteration: int, base_lrs: Sequence[float]) -> list[GroupValues]:
        """The values for each parameter group at an iteration (-1: the start).

        `base_lrs` holds each group's own rate from before the schedule touched it. Raises ValueError if a list given
        per group has another length than `base_lrs`.
        """

    def _spread(self, key: str, num_groups: int) -> tuple[float, ...]:
        """A `PerGroup` field as one value for each group."""
        value: PerGroup = getattr(self, key)
        if not isinstance(value, tuple):
            return (value,) * num_groups
        if len(value) != num_groups:
            raise ValueError(
                f"scheduler {type(self).__name__}: {key} has {len(value)} values for {num_groups} parameter groups; "
                "give one number, or one for each group"
            )
        return value


@dataclass(frozen=True, kw_only=True)
class _Warmup(ScheduleRule):
    """The keys and the rising part that the three warmup schedules share."""

    warmup_num_steps: int = field(default=1000, metadata=_is(_whole(1)))
    warmup_type: str = field(default="log", metadata=_is(_WARMUP_TYPE))

    @property
    def warmup_steps(self) -> int:
        """At least 2, as in DeepSpeed: one step would make the logarithm of the last step 0."""
        return max(2, self.warmup_num_steps)

    def _rise(self, iteration: int) -> float:
        """The fraction of the warmup that is behind us, 0 at iteration 0."""
        if self.warmup_type == "linear":
            return iteration / self.warmup_steps
        return math.log(iteration + 1) / math.log(self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class WarmupLR(_Warmup):
    """From `warmup_min_lr` to `warmup_max_lr` (None: each group's own lr), then constant."""

    warmup_min_lr: PerGroup = field(default=0.0, metadata=_is(_NOT_NEGATIVE.per_group()))
    warmup_max_lr: PerGroup | None = field(default=None, metadata=_is(_NOT_NEGATIVE.per_group().or_none()))

    def _scale(self, iteration: int) -> float:
        """How far between the lower (0) and the upper (1) rate an iteration stands."""
        return self._rise(iteration) if iteration < self.warmup_steps else 1.0

    def at(self, iteration: int, base_lrs: Sequence[float]) -> list[GroupValues]:
        low = self._spread("warmup_min_lr", len(base_lrs))
        high = base_lrs if self.warmup_max_lr is None else self._spread("warmup_max_lr", len(base_lrs))
        scale = 0.0 if iteration < 0 else self._scale(iteration)
        return [GroupValues(least + (most - least) * scale) for least, most in zip(low, high, strict=True)]


@dataclass(frozen=True, kw_only=True)
class WarmupDecayLR(WarmupLR):
    """As WarmupLR, then linearly down, reaching `warmup_min_lr` at iteration `total_num_steps`."""

    total_num_steps: int = field(metadata=_is(_whole(1)))
    warmup_max_lr: PerGroup | None = field(default=0.001, metadata=_is(_NOT_NEGATIVE.per_group().or_none()))

    def __post_init__(self) -> None:
        super().__post_init__()
        _report_short_total(self, self.total_num_steps)

    def _scale(self, iteration: int) -> float:
        if iteration < self.warmup_steps:
            return self._rise(iteration)
        return max(0.0, (self.total_num_steps - iteration) / max(1, self.total_num_steps - self.warmup_steps))


@dataclass(frozen=True, kw_only=True)
class WarmupCosineLR(_Warmup):
    """Each group's own lr times a ratio: from `warmup_min_ratio` up to 1, then along a cosine to `cos_min_ratio`."""

    total_num_steps: int = field(metadata=_is(_whole(1)))
    warmup_min_ratio: float = field(default=0.0, metadata=_is(_NOT_NEGATIVE))
    cos_min_ratio: float = field(default=0.0001, metadata=_is(_NOT_NEGATIVE))

    def __post_init__(self) -> None:
        super().__post_init__()
        _report_short_total(self, self.total_num_steps)

    def _ratio(self, iteration: int) -> float:
        if iteration < 0:
            return 0.0
        if iteration < self.warmup_steps:
            return self.warmup_min_ratio + (1 - self.warmup_min_ratio) * self._rise(iteration)
        progress = (iteration - self.warmup_steps + 1) / max(1, self.total_num_steps - self.warmup_steps)
        wave = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return self.cos_min_ratio + (1 - self.cos_min_ratio) * wave

    def at(self, iteration: int, base_lrs: Sequence[float]) -> list[GroupValues]:
        return [GroupValues(base * self._ratio(iteration)) for base in base_lrs]


def _report_short_total(rule: _Warmup, total_num_steps: int) -> None:
    if total_num_steps < rule.warmup_steps:
        logger.warning(
            "scheduler %s: total_num_steps %d is less than the %d warmup steps, so the rate drops at once after them",
            *(type(rule).__name__, total_num_steps, rule.warmup_steps),
        )


@dataclass(frozen=True, kw_only=True)
class OneCycle(ScheduleRule):
    """One rise from `cycle_min_lr` to `cycle_max_lr` and back (Smith 2018), then decay of the rate by division.

    Momentum (beta1) moves the other way, with beta2 set to 0.99. As in DeepSpeed it starts at `cycle_min_mom`, jumps
    to the top of its range with the first `step()`, and a positive `decay_mom_rate` makes it grow after the cycle,
    past 1 in the end. A stair count above 0 holds the values on that many stairs; a `decay_step_size` of 0 means no
    decay.
    """

    cycle_min_lr: PerGroup = field(metadata=_is(_NOT_NEGATIVE.per_group()))
    cycle_max_lr: PerGroup = field(metadata=_is(_NOT_NEGATIVE.per_group()))
    decay_lr_rate: float = field(default=0.0, metadata=_is(_NOT_NEGATIVE))
    cycle_first_step_size: int = field(default=2000, metadata=_is(_whole(1)))
    cycle_second_step_size: int | None = field(default=None, metadata=_is(_whole(0).or_none()))
    cycle_first_stair_count: int = field(default=0, metadata=_is(_whole(-1)))
    cycle_second_stair_count: int | None = field(default=None, metadata=_is(_whole(-1).or_none()))
    decay_step_size: int = field(default=0, metadata=_is(_whole(0)))
    cycle_momentum: bool = field(default=True, metadata=_is(_BOOLEAN))
    cycle_min_mom: PerGroup = field(default=0.8, metadata=_is(_MOMENTUM.per_group()))
    cycle_max_mom: PerGroup = field(default=0.9, metadata=_is(_MOMENTUM.per_group()))
    decay_mom_rate: float = field(default=0.0, metadata=_is(_NUMBER))

    def _height(self, position: int, first: int, second: int) -> float:
        """How far up the cycle we are, 0 to 1, `position` steps into it."""
        climbed, length, stairs = position, first, self.cycle_first_stair_count
        if position > first:
            climbed, length = first + second - position, second
            if self.cycle_second_stair_count is not None:
                stairs = self.cycle_second_stair_count
        return climbed * stairs // length / stairs if stairs > 0 else climbed / length

    def at(self, iteration: int, base_lrs: Sequence[float]) -> list[GroupValues]:
        first = self.cycle_first_step_size
        second = first if self.cycle_second_step_size is None else self.cycle_second_step_size
        count = iteration + 1  # calls of step() so far
        height = self._height(count, first, second) if count < first + second else 0.0
        after = max(0, count - first - second) / self.decay_step_size if self.decay_step_size else 0.0
        low, high = (self._spread(key, len(base_lrs)) for key in ("cycle_min_lr", "cycle_max_lr"))
        lrs = [
            (least + (most - least) * height) / (1 + self.decay_lr_rate * after)
            for least, most in zip(low, high, strict=True)
        ]
        if not self.cycle_momentum:
            return [GroupValues(lr) for lr in lrs]
        least_mom, most_mom = (self._spread(key, len(base_lrs)) for key in ("cycle_min_mom", "cycle_max_mom"))
        momenta = [
            least if iteration < 0 else (most - (most - least) * height) * (1 + self.decay_mom_rate * after)
            for least, most in zip(least_mom, most_mom, strict=True)
        ]
        return [GroupValues(lr, (momentum, 0.99)) for lr, momentum in zip(lrs, momenta, strict=True)]


@dataclass(frozen=True, kw_only=True)
class LRRangeTest(ScheduleRule):
    """Growth by `lr_range_test_step_rate` times the first rate in every `lr_range_test_step_size` steps."""

    lr_range_test_min_lr: PerGroup = field(default=0.001, metadata=_is(_NOT_NEGATIVE.per_group()))
    lr_range_test_step_size: int = field(default=2000, metadata=_is(_whole(1)))
    lr_range_test_step_rate: float = field(default=1.0, metadata=_is(_NOT_NEGATIVE))
    lr_range_test_staircase: bool = field(default=False, metadata=_is(_BOOLEAN))

    def at(self, iteration: int, base_lrs: Sequence[float]) -> list[GroupValues]:
        size, count = self.lr_range_test_step_size, iteration + 1
        intervals = count // size if self.lr_range_test_staircase else count / size
        growth = 1 + self.lr_range_test_step_rate * intervals
        return [GroupValues(lr * growth) for lr in self._spread("lr_range_test_min_lr", len(base_lrs))]


SCHEDULES: dict[str, type[ScheduleRule]] = {
    rule.__name__: rule for rule in (WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest)
}


class Schedule:
    """Writes a rule's values into an optimizer's parameter groups; used like a `torch.optim.lr_scheduler`.

    Starting values are written at once. A group's `lr` that is a tensor is filled in place, and `betas` are written
    only to groups that have them.
    """

    def __init__(self, optimizer: HasParamGroups, rule: ScheduleRule) -> None:
        self.optimizer = optimizer
        self.rule = rule
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
        kind = _whole(-1)
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
