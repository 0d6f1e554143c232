"""The schedules of DeepSpeed as pure rules: iteration and base rates in, learning rates (and betas) out.

`windlass.core.schedules` says which iteration rules which optimizer step, and drives an optimizer with a rule.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

logger = logging.getLogger(__name__)

PerGroup: TypeAlias = float | tuple[float, ...]
"""One value for every parameter group, or one for each."""


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


def whole_number(least: int) -> _Kind:
    # JSON's 1e3 arrives as the float 1000.0 and means the count 1000.
    wanted = f"a whole number of at least {least}"
    return _Kind(wanted, lambda value: _is_number(value) and value == int(value) >= least, int)


_NUMBER = _Kind("a finite number", _is_number, float)
_NOT_NEGATIVE = _Kind("a finite number of at least 0", lambda value: _is_number(value) and value >= 0, float)
_MOMENTUM = _Kind("a number from 0 to below 1", lambda value: _is_number(value) and 0 <= value < 1, float)
_BOOLEAN = _Kind("true or false", lambda value: isinstance(value, bool))
_WARMUP_TYPE = _Kind("'log' or 'linear'", lambda value: isinstance(value, str) and value in ("log", "linear"))


def _is(kind: _Kind) -> dict[str, object]:
    return {"kind": kind}


def _rate(kind: _Kind) -> dict[str, object]:
    """Of a field that is written into every group as it is, whatever its own rate was."""
    return {"kind": kind, "rate": True}


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

    def for_ratios(self, ratios: Sequence[float]) -> ScheduleRule:
        """The same schedule for groups whose rates stand in these ratios to the one rate for all that it was given;
        what is given as a list stays as it is."""
        if all(ratio == 1 for ratio in ratios):
            return self
        spread: dict[str, Any] = {
            name: tuple(getattr(self, name) * ratio for ratio in ratios)
            for name in rate_fields(type(self))
            if isinstance(getattr(self, name), float)
        }
        return replace(self, **spread)

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


def rate_fields(kind: type[ScheduleRule]) -> list[str]:
    """The keys whose values are learning rates for all groups."""
    return [item.name for item in fields(kind) if item.metadata.get("rate")]


def single_rates(kind: type[ScheduleRule], params: Mapping[str, object]) -> list[str]:
    """Those of them that give one rate for all groups. 0 does not count: it is the same in any ratio."""
    defaults = {item.name: item.default for item in fields(kind)}
    values = {name: params.get(name, defaults[name]) for name in rate_fields(kind)}
    return [name for name, value in values.items() if isinstance(value, int | float) and value]


@dataclass(frozen=True, kw_only=True)
class _Warmup(ScheduleRule):
    """The keys and the rising part that the three warmup schedules share."""

    warmup_num_steps: int = field(default=1000, metadata=_is(whole_number(1)))
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

    warmup_min_lr: PerGroup = field(default=0.0, metadata=_rate(_NOT_NEGATIVE.per_group()))
    warmup_max_lr: PerGroup | None = field(default=None, metadata=_rate(_NOT_NEGATIVE.per_group().or_none()))

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

    total_num_steps: int = field(metadata=_is(whole_number(1)))
    warmup_max_lr: PerGroup | None = field(default=0.001, metadata=_rate(_NOT_NEGATIVE.per_group().or_none()))

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

    total_num_steps: int = field(metadata=_is(whole_number(1)))
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

    cycle_min_lr: PerGroup = field(metadata=_rate(_NOT_NEGATIVE.per_group()))
    cycle_max_lr: PerGroup = field(metadata=_rate(_NOT_NEGATIVE.per_group()))
    decay_lr_rate: float = field(default=0.0, metadata=_is(_NOT_NEGATIVE))
    cycle_first_step_size: int = field(default=2000, metadata=_is(whole_number(1)))
    cycle_second_step_size: int | None = field(default=None, metadata=_is(whole_number(0).or_none()))
    cycle_first_stair_count: int = field(default=0, metadata=_is(whole_number(-1)))
    cycle_second_stair_count: int | None = field(default=None, metadata=_is(whole_number(-1).or_none()))
    decay_step_size: int = field(default=0, metadata=_is(whole_number(0)))
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

    lr_range_test_min_lr: PerGroup = field(default=0.001, metadata=_rate(_NOT_NEGATIVE.per_group()))
    lr_range_test_step_size: int = field(default=2000, metadata=_is(whole_number(1)))
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
