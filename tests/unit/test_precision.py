"""Dynamic loss scaling by its definition."""

from __future__ import annotations

import json

import pytest

from windlass.core.precision import LossScaler


def run(scaler: LossScaler, overflows: str) -> list[float]:
    """The scale after each step; "x" overflows, "." does not."""
    scales = []
    for one in overflows:
        scaler.update(one == "x")
        scales.append(scaler.scale)
    return scales


def test_scale_backs_off_on_overflow_and_grows_after_a_window() -> None:
    scaler = LossScaler(scale=64.0, static=False, window=3, hysteresis=1)
    assert run(scaler, "x..x...") == [32, 32, 32, 16, 16, 16, 32]


def test_hysteresis_forgives_the_first_overflows() -> None:
    scaler = LossScaler(scale=64.0, static=False, window=100, hysteresis=3)
    assert run(scaler, "xxxx") == [64, 64, 32, 16]


def test_forgiven_overflows_are_counted_anew_after_a_window() -> None:
    scaler = LossScaler(scale=64.0, static=False, window=2, hysteresis=2)
    assert run(scaler, "x..xx") == [64, 64, 128, 128, 64]


def test_consecutive_hysteresis_is_refilled_by_every_good_step() -> None:
    scaler = LossScaler(scale=64.0, static=False, window=100, hysteresis=2, consecutive_hysteresis=True)
    assert run(scaler, "x.x.xx") == [64, 64, 64, 64, 64, 32]


def test_scale_never_falls_below_the_minimum() -> None:
    scaler = LossScaler(scale=4.0, static=False, hysteresis=1, minimum=2.0)
    assert run(scaler, "xxx") == [2, 2, 2]


def test_static_scale_stays() -> None:
    assert run(LossScaler(scale=128.0), "x.x") == [128, 128, 128]


def test_state_goes_on_where_it_was() -> None:
    scaler, other = (LossScaler(scale=64.0, static=False, window=3, hysteresis=2) for _ in range(2))
    run(scaler, "x..")
    other.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    assert run(scaler, ".xx.") == run(other, ".xx.") == pytest.approx([128, 128, 64, 64])
