"""Every schedule gives DeepSpeed's rates, step by step, and is driven like a `torch.optim.lr_scheduler`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from math import cos, log, pi
from typing import Any, TypeAlias

import pytest
import torch

from windlass.core.schedules import SCHEDULES, Schedule, build_schedule

Rates: TypeAlias = list[list[float]]  # (optimizer steps, parameter groups)


def adam(*lrs: float) -> torch.optim.Adam:
    return torch.optim.Adam([{"params": [torch.zeros(1)], "lr": lr} for lr in lrs])


def run(kind: str, params: Mapping[str, object], lrs: list[float], steps: int) -> tuple[Rates, Rates]:
    """The rate and beta1 of each group that optimizer steps 1, 2, ... would use."""
    optimizer = adam(*lrs)
    schedule = build_schedule(optimizer, kind, params)
    rates, momenta = [], []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        momenta.append([group["betas"][0] for group in optimizer.param_groups])
        assert schedule.get_last_lr() == rates[-1]
        schedule.step()
    return rates, momenta


# Parameters, the groups' own rates, and what optimizer steps 1, 2, ... use: recorded with DeepSpeed 0.19.8 on
# torch.optim.Adam, reading the groups before each step.
# fmt: off
RECORDED: dict[str, tuple[str, dict[str, object], list[float], Rates]] = {
    "warmup_log": (
        "WarmupLR", {"warmup_num_steps": 4, "warmup_min_lr": 0.01, "warmup_max_lr": 0.1}, [0.5],
        [[0.01], [0.01], [0.05500000000000001], [0.08132331253245204], [0.1], [0.1], [0.1]],
    ),
    "warmup_own": (
        "WarmupLR", {"warmup_num_steps": 4, "warmup_type": "linear"}, [0.5, 0.25],
        [[0.0, 0.0], [0.0, 0.0], [0.125, 0.0625], [0.25, 0.125], [0.375, 0.1875], [0.5, 0.25], [0.5, 0.25]],
    ),
    "warmup_one": (
        "WarmupLR", {"warmup_num_steps": 1, "warmup_min_lr": [0.0, 0.1], "warmup_max_lr": [0.5, 0.3]}, [0.5, 0.25],
        [[0.0, 0.1], [0.0, 0.1], [0.5, 0.3], [0.5, 0.3], [0.5, 0.3]],
    ),
    "decay": (
        "WarmupDecayLR", {"total_num_steps": 8, "warmup_num_steps": 3, "warmup_min_lr": 0.01, "warmup_max_lr": 0.1},
        [0.5],
        [[0.01], [0.01], [0.06678367782143116], [0.1], [0.1], [0.082], [0.064], [0.046000000000000006],
        [0.028000000000000004], [0.01], [0.01]],
    ),
    "decay_default": (
        "WarmupDecayLR", {"total_num_steps": 6, "warmup_num_steps": 2, "warmup_type": "linear"}, [0.5, 0.2],
        [[0.0, 0.0], [0.0, 0.0], [0.0005, 0.0005], [0.001, 0.001], [0.00075, 0.00075], [0.0005, 0.0005], [0.00025,
        0.00025], [0.0, 0.0], [0.0, 0.0]],
    ),
    "decay_short": (
        "WarmupDecayLR", {"total_num_steps": 2, "warmup_num_steps": 4}, [0.5],
        [[0.0], [0.0], [0.0005], [0.0007924812503605781], [0.001], [0.0], [0.0]],
    ),
    "cosine": (
        "WarmupCosineLR", {"total_num_steps": 9, "warmup_num_steps": 3, "warmup_min_ratio": 0.1, "cos_min_ratio":
        0.05}, [0.5, 0.25],
        [[0.0, 0.0], [0.05, 0.025], [0.33391838910715577, 0.16695919455357788], [0.5, 0.25], [0.46818103339880424,
        0.23409051669940212], [0.38125, 0.190625], [0.2625, 0.13125], [0.14375000000000004, 0.07187500000000002],
        [0.05681896660119581, 0.028409483300597903], [0.025, 0.0125], [0.025, 0.0125], [0.025, 0.0125]],
    ),
    "cosine_default": (
        "WarmupCosineLR", {"total_num_steps": 6, "warmup_num_steps": 2, "warmup_type": "linear"}, [0.5],
        [[0.0], [0.0], [0.25], [0.4267840176271072], [0.250025], [0.0732659823728928], [5e-05], [5e-05], [5e-05]],
    ),
    "cosine_short": (
        "WarmupCosineLR", {"total_num_steps": 2, "warmup_num_steps": 3}, [0.5],
        [[0.0], [0.0], [0.31546487678572865], [0.5], [5e-05], [5e-05]],
    ),
    "cycle": (
        "OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 4, "cycle_second_step_size":
        3, "decay_step_size": 2, "decay_lr_rate": 0.5, "decay_mom_rate": 0.01}, [0.3],
        [[0.1], [0.19999999999999996], [0.29999999999999993], [0.4], [0.5], [0.3666666666666666],
        [0.23333333333333328], [0.1], [0.08], [0.06666666666666667], [0.05714285714285715]],
    ),
    "cycle_groups": (
        "OneCycle", {"cycle_min_lr": [0.1, 0.2], "cycle_max_lr": [0.5, 0.3], "cycle_first_step_size": 3,
        "cycle_min_mom": [0.7, 0.8], "cycle_max_mom": [0.9, 0.95]}, [0.3, 0.1],
        [[0.1, 0.2], [0.2333333333333334, 0.23333333333333334], [0.3666666666666666, 0.26666666666666666], [0.5, 0.3],
        [0.3666666666666668, 0.2666666666666667], [0.23333333333333323, 0.2333333333333333], [0.1, 0.2], [0.1, 0.2],
        [0.1, 0.2]],
    ),
    "cycle_stairs": (
        "OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 6, "cycle_second_step_size":
        4, "cycle_first_stair_count": 3, "cycle_second_stair_count": 2, "cycle_momentum": False}, [0.3],
        [[0.1], [0.1], [0.23333333333333334], [0.23333333333333334], [0.3666666666666667], [0.3666666666666667],
        [0.5], [0.30000000000000004], [0.30000000000000004], [0.1], [0.1], [0.1]],
    ),
    "cycle_no_second": (
        "OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 3, "cycle_second_step_size":
        0, "cycle_momentum": False, "decay_step_size": 1, "decay_lr_rate": 1.0}, [0.3],
        [[0.1], [0.2333333333333333], [0.3666666666666666], [0.1], [0.05], [0.03333333333333333]],
    ),
    "range": (
        "LRRangeTest", {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 4, "lr_range_test_step_rate": 2.0},
        [0.3],
        [[0.01], [0.015], [0.02], [0.025], [0.03], [0.035]],
    ),
    "range_stairs": (
        "LRRangeTest", {"lr_range_test_min_lr": [0.01, 0.02], "lr_range_test_step_size": 3, "lr_range_test_staircase":
        True}, [0.3, 0.1],
        [[0.01, 0.02], [0.01, 0.02], [0.01, 0.02], [0.02, 0.04], [0.02, 0.04], [0.02, 0.04], [0.03, 0.06], [0.03,
        0.06]],
    ),
}

MOMENTA: dict[str, Rates] = {  # beta1, recorded in the same runs
    "cycle": [
        [0.8], [0.875], [0.8500000000000001], [0.8250000000000001], [0.8], [0.8333333333333334], [0.8666666666666667],
        [0.9], [0.9045], [0.909], [0.9135],
    ],
    "cycle_groups": [
        [0.7, 0.8], [0.8333333333333333, 0.8999999999999999], [0.7666666666666666, 0.8500000000000001], [0.7, 0.8],
        [0.7666666666666666, 0.85], [0.8333333333333334, 0.9], [0.9, 0.95], [0.9, 0.95], [0.9, 0.95],
    ],
}
# fmt: on


@pytest.mark.parametrize("case", RECORDED)
def test_rates_are_deepspeeds(case: str) -> None:
    kind, params, lrs, expected = RECORDED[case]
    rates, momenta = run(kind, params, lrs, len(expected))
    assert rates == [pytest.approx(row, rel=1e-12, abs=1e-17) for row in expected]
    unchanged = [[0.9] * len(lrs)] * len(expected)
    assert momenta == [pytest.approx(row, rel=1e-12) for row in MOMENTA.get(case, unchanged)]


def test_every_schedule_is_recorded() -> None:
    assert {kind for kind, *_ in RECORDED.values()} == set(SCHEDULES)


# The definitions, written out: each maps k, the number of step() calls so far, to the rate.
DEFINITIONS: list[tuple[str, dict[str, object], Callable[[int], float]]] = [
    (
        "WarmupLR",
        {"warmup_min_lr": 0.2, "warmup_max_lr": 1.0, "warmup_num_steps": 10},
        lambda k: 0.2 + 0.8 * (log(max(k, 1)) / log(10) if k <= 10 else 1),
    ),
    (
        "WarmupDecayLR",
        {"warmup_max_lr": 1.0, "warmup_num_steps": 10, "total_num_steps": 30, "warmup_type": "linear"},
        lambda k: max(k - 1, 0) / 10 if k <= 10 else max(0, (30 - (k - 1)) / 20),
    ),
    (
        "WarmupCosineLR",
        {"warmup_num_steps": 10, "total_num_steps": 30, "warmup_type": "linear", "cos_min_ratio": 0.1},
        lambda k: 0.5 * (max(k - 1, 0) / 10 if k <= 10 else 0.1 + 0.9 * (1 + cos(pi * min(1, (k - 10) / 20))) / 2),
    ),
    (
        "OneCycle",
        {
            "cycle_min_lr": 1.0,
            "cycle_max_lr": 3.0,
            "cycle_first_step_size": 10,
            "decay_step_size": 5,
            "decay_lr_rate": 2.0,
        },
        lambda k: 1 + 2 * (1 - abs(k - 10) / 10) if k <= 20 else 1 / (1 + 2.0 * (k - 20) / 5),
    ),
    ("LRRangeTest", {"lr_range_test_step_size": 10}, lambda k: 0.001 * (1 + k / 10)),
    (
        "LRRangeTest",
        {"lr_range_test_min_lr": 1.0, "lr_range_test_step_size": 10, "lr_range_test_staircase": True},
        lambda k: 1 + k // 10,
    ),
]


@pytest.mark.parametrize(("kind", "params", "rate"), DEFINITIONS)
def test_rates_follow_the_definition(kind: str, params: dict[str, object], rate: Callable[[int], float]) -> None:
    rates, _ = run(kind, params, [0.5], 45)
    assert [row[0] for row in rates] == pytest.approx([rate(k) for k in range(45)], rel=1e-12, abs=1e-15)


# Defaults as in the signatures of DeepSpeed 0.19.8.
DEFAULTS: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "WarmupLR": ({}, {"warmup_min_lr": 0, "warmup_max_lr": None, "warmup_num_steps": 1000, "warmup_type": "log"}),
    "WarmupDecayLR": (
        {"total_num_steps": 5000},
        {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000, "warmup_type": "log"},
    ),
    "WarmupCosineLR": (
        {"total_num_steps": 5000},
        {"warmup_min_ratio": 0, "warmup_num_steps": 1000, "cos_min_ratio": 0.0001, "warmup_type": "log"},
    ),
    "OneCycle": (
        {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2},
        {
            "decay_lr_rate": 0,
            "cycle_first_step_size": 2000,
            "cycle_second_step_size": None,
            "cycle_first_stair_count": 0,
            "cycle_second_stair_count": None,
            "decay_step_size": 0,
            "cycle_momentum": True,
            "cycle_min_mom": 0.8,
            "cycle_max_mom": 0.9,
            "decay_mom_rate": 0,
        },
    ),
    "LRRangeTest": (
        {},
        {
            "lr_range_test_min_lr": 0.001,
            "lr_range_test_step_size": 2000,
            "lr_range_test_step_rate": 1,
            "lr_range_test_staircase": False,
        },
    ),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_keys_and_defaults_are_deepspeeds(kind: str) -> None:
    required, defaults = DEFAULTS[kind]
    assert vars(build_schedule(adam(0.5), kind, required).rule) == {**required, **defaults}
    if required:
        with pytest.raises(ValueError, match=f"scheduler {kind} needs {' and '.join(required)}"):
            build_schedule(adam(0.5), kind, {})


def test_one_cycle_sets_beta2_and_leaves_groups_without_betas_alone() -> None:
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([{"params": [first]}, {"params": [second]}])
    del optimizer.param_groups[1]["betas"]
    schedule = build_schedule(optimizer, "OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2})
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.99)
    schedule.step()
    assert optimizer.param_groups[0]["betas"] == pytest.approx((0.9 - 0.1 / 2000, 0.99))
    assert "betas" not in optimizer.param_groups[1]


def test_one_cycle_says_so_when_no_group_has_betas(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    with caplog.at_level(logging.WARNING):
        build_schedule(optimizer, "OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2})
    assert [record.getMessage() for record in caplog.records] == [
        "scheduler OneCycle: no parameter group has betas, so momentum is not cycled"
    ]


def test_tensor_rate_is_filled_in_place() -> None:
    rate = torch.tensor(0.5)
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=rate, capturable=False, foreach=False)
    held = optimizer.param_groups[0]["lr"]
    schedule = build_schedule(optimizer, "WarmupLR", {"warmup_num_steps": 2, "warmup_type": "linear"})
    schedule.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == 0.25
    assert schedule.get_last_lr() == [0.25]


@pytest.mark.parametrize("case", RECORDED)
def test_a_saved_schedule_goes_on_where_it_was(case: str) -> None:
    kind, params, lrs, expected = RECORDED[case]
    before = build_schedule(adam(*lrs), kind, params)
    for _ in range(3):
        before.step()
    saved = json.loads(json.dumps(before.state_dict()))

    optimizer = adam(*[9.0] * len(lrs))  # another rate of its own: the saved one counts
    after = build_schedule(optimizer, kind, params)
    after.load_state_dict(saved)
    for row in expected[3:]:
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(row, rel=1e-12, abs=1e-17)
        assert after.get_last_lr() == before.get_last_lr()
        before.step()
        after.step()
    assert after.state_dict() == before.state_dict()


def test_deepspeeds_state_is_understood() -> None:
    schedule = build_schedule(adam(0.5), "LRRangeTest", {"lr_range_test_min_lr": 1.0, "lr_range_test_step_size": 10})
    schedule.load_state_dict({"last_batch_iteration": 4})
    assert schedule.get_last_lr() == [1.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "OneCycle"}, "scheduler WarmupLR cannot go on from the state of OneCycle"),
        ({"base_lrs": [0.1]}, r"base_lrs in the state must be 2 numbers, .*, got \[0.1\]"),
        ({"last_batch_iteration": None}, "last_batch_iteration in the state must be a whole number of at least -1"),
        ({"last_batch_iteration": -2}, "last_batch_iteration in the state must be .* got -2"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    schedule = build_schedule(adam(0.5, 0.25), "WarmupLR", {})
    schedule.step()
    before = schedule.state_dict()
    with pytest.raises(ValueError, match=message):
        schedule.load_state_dict({**before, **change})
    assert schedule.state_dict() == before


CYCLE = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2}


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("WarmupLr", {}, "no scheduler type 'WarmupLr' .* did you mean 'WarmupLR'"),
        ("Polynomial", {}, r"no scheduler type 'Polynomial' \(known: WarmupLR, .*\)$"),
        ("WarmupLR", {"warmup_steps": 5}, "WarmupLR has no parameter 'warmup_steps' .* mean 'warmup_num_steps'"),
        ("WarmupLR", {"total_num_steps": 5}, "WarmupLR has no parameter 'total_num_steps'"),
        ("WarmupCosineLR", {"total_num_steps": 9, "warmup_max_lr": 1.0}, "no parameter 'warmup_max_lr'"),
        ("OneCycle", {"cycle_max_lr": 0.1}, "OneCycle needs cycle_min_lr in its params"),
        ("WarmupLR", {"warmup_num_steps": 0}, "warmup_num_steps must be a whole number of at least 1, got 0"),
        ("WarmupLR", {"warmup_num_steps": 2.5}, "warmup_num_steps must be a whole number"),
        ("WarmupLR", {"warmup_num_steps": True}, "warmup_num_steps must be a whole number"),
        ("WarmupLR", {"warmup_max_lr": "auto"}, "warmup_max_lr must be a finite number .* got 'auto'"),
        ("WarmupLR", {"warmup_max_lr": [0.1, float("nan")]}, "warmup_max_lr must be a finite number"),
        ("WarmupLR", {"warmup_max_lr": [0.1, 0.2, 0.3]}, "warmup_max_lr has 3 values for 2 parameter groups"),
        ("WarmupLR", {"warmup_type": "cosine"}, "warmup_type must be 'log' or 'linear', got 'cosine'"),
        ("OneCycle", {**CYCLE, "cycle_max_mom": 1.0}, "cycle_max_mom must be a number from 0 to below 1"),
        ("OneCycle", {**CYCLE, "cycle_min_mom": [0.8]}, "cycle_min_mom has 1 values for 2 parameter groups"),
        ("LRRangeTest", {"lr_range_test_staircase": 1}, "lr_range_test_staircase must be true or false, got 1"),
    ],
)
def test_bad_input_is_refused_and_the_optimizer_untouched(kind: str, params: dict[str, object], message: str) -> None:
    optimizer = adam(0.5, 0.25)
    with pytest.raises(ValueError, match=message) as caught:
        build_schedule(optimizer, kind, params)
    assert "\n" not in str(caught.value)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert [group["betas"] for group in optimizer.param_groups] == [(0.9, 0.999)] * 2


def test_json_floats_are_counts() -> None:
    schedule = build_schedule(adam(0.5), "WarmupLR", json.loads('{"warmup_num_steps": 1e3}'))
    assert vars(schedule.rule)["warmup_num_steps"] == 1000


def test_a_group_added_later_is_refused() -> None:
    optimizer = adam(0.5)
    schedule = build_schedule(optimizer, "WarmupLR", {})
    optimizer.add_param_group({"params": [torch.zeros(1)]})
    with pytest.raises(ValueError, match="built for 1 parameter groups and the optimizer now has 2"):
        schedule.step()


@pytest.mark.parametrize("kind", ["WarmupDecayLR", "WarmupCosineLR"])
def test_a_total_shorter_than_the_warmup_is_reported(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build_schedule(adam(0.5), kind, {"total_num_steps": 5, "warmup_num_steps": 9})
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        f"scheduler {kind}: total_num_steps 5 is less than the 9 warmup steps"
    ]


Scheduler: TypeAlias = Schedule | torch.optim.lr_scheduler.LRScheduler


def linear_warmup(optimizer: torch.optim.Optimizer) -> Schedule:
    return build_schedule(optimizer, "WarmupLR", {"warmup_num_steps": 4, "warmup_type": "linear"})


def torch_linear_warmup(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(max(k - 1, 0) / 4, 1.0))


def torch_cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.CosineAnnealingLR:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)


def train(
    build: Callable[[torch.optim.Optimizer], Scheduler], resume_after: int | None = None
) -> tuple[float, list[float]]:
    """Eight steps of SGD on weight**2 / 2 from 1; at `resume_after`, optimizer and scheduler are rebuilt from state."""
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scheduler = build(optimizer)
    rates = []
    for step in range(8):
        if step == resume_after:
            optimizer_state, state = optimizer.state_dict(), scheduler.state_dict()
            optimizer = torch.optim.SGD([weight], lr=0.5)
            scheduler = build(optimizer)
            optimizer.load_state_dict(optimizer_state)
            scheduler.load_state_dict(state)
        rates.append(float(scheduler.get_last_lr()[0]))
        weight.grad = weight.detach().clone()
        optimizer.step()
        scheduler.step()
    return weight.item(), rates


@pytest.mark.parametrize("resume_after", [None, 5])
@pytest.mark.parametrize("build", [linear_warmup, torch_linear_warmup, torch_cosine])
def test_ours_and_torchs_drive_the_same_loop(
    build: Callable[[torch.optim.Optimizer], Scheduler], resume_after: int | None
) -> None:
    weight, rates = train(build, resume_after)
    decay = 1.0
    for rate in rates:
        decay *= 1 - rate
    assert weight == pytest.approx(decay, rel=1e-12)  # the rates shown are the rates used
    if build is torch_cosine:
        expected = [0.5 * (1 + cos(pi * k / 8)) / 2 for k in range(8)]
    else:
        expected = [0.5 * min(max(k - 1, 0) / 4, 1) for k in range(8)]
    assert rates == pytest.approx(expected, rel=1e-12)
