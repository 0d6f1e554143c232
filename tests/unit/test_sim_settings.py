"""WINDLASS_SIM: what is read, and what is refused in which words."""

from __future__ import annotations

import pytest

from windlass.accelerator.environment import read_environment
from windlass.backends.sim.settings import Fault, SimSettings, parse_settings


def test_nothing_said_means_the_defaults() -> None:
    assert parse_settings("") == SimSettings(
        machine="laptop", seed=0, views=False, delay_ms=0.3, pace=0.0, host_reads=1, uniform=False, fault=None
    )


def test_every_key_is_read() -> None:
    text = (
        "machine=h200, seed=7,views=true,delay_ms=1.5,pace=2,host_reads=3,uniform=1,fault=slow:rank=1:at=12:seconds=0.5"
    )
    assert parse_settings(text) == SimSettings("h200", 7, True, 1.5, 2.0, 3, True, Fault("slow", 1, 12, 0.5))


@pytest.mark.parametrize("kind", ["inf", "exception", "kill", "slow", "drop"])
def test_fault_strikes_the_first_unless_told_otherwise(kind: str) -> None:
    assert parse_settings(f"fault={kind}:rank=2").fault == Fault(kind, 2, at=1, seconds=1.0)


@pytest.mark.parametrize("text", ["views=false", "views=0", "views=False"])
def test_flag_can_be_switched_off(text: str) -> None:
    assert not parse_settings(text).views


def test_variable_reaches_the_settings() -> None:
    environment = read_environment({"WINDLASS_SIM": " machine=gh200,seed=3 "})
    assert parse_settings(environment.simulation) == SimSettings(machine="gh200", seed=3)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("sed=7", "WINDLASS_SIM has no key 'sed' (did you mean 'seed'?), the keys are machine, seed, views, delay_ms, "
         "pace, host_reads, uniform, fault"),
        ("colour=red", "WINDLASS_SIM has no key 'colour'"),
        ("seed", "WINDLASS_SIM needs a value for 'seed', as in seed=VALUE, got 'seed'"),
        ("seed=", "WINDLASS_SIM needs a value for 'seed'"),
        ("seed=1,seed=2", "WINDLASS_SIM gives 'seed' twice, got '2' after 1; keep one"),
        ("seed=-1", "'seed' of WINDLASS_SIM must be a whole number from 0, got '-1'"),
        ("views=maybe", "'views' of WINDLASS_SIM must be true or false, got 'maybe'"),
        ("delay_ms=soon", "'delay_ms' of WINDLASS_SIM must be a number from 0, got 'soon'"),
        ("pace=inf", "'pace' of WINDLASS_SIM must be a number from 0, got 'inf'"),
        ("delay_ms=nan", "'delay_ms' of WINDLASS_SIM must be a number from 0, got 'nan'"),
        ("machine=h20", "'machine' of WINDLASS_SIM cannot be used: no machine is named 'h20' (did you mean 'h200'?), "
         "the machines are gh200, h100-pcie5, h200, laptop, tpu-v5e"),
        ("fault=kil:rank=1", "'fault' of WINDLASS_SIM has no kind 'kil' (did you mean 'kill'?), it must begin with "
         "one of inf, exception, kill, slow, drop"),
        ("fault=kill", "'fault' of WINDLASS_SIM must say which rank it befalls, as in kill:rank=1:at=3, got 'kill'"),
        ("fault=kill:rank=1:at=0", "'at' of 'fault' of WINDLASS_SIM must be a whole number from 1, got '0'"),
        ("fault=kill:rank=1:after=2", "'fault' of WINDLASS_SIM has no key 'after', the keys are rank, at, seconds"),
    ],
)  # fmt: skip
def test_refusal_says_what_and_where(text: str, wanted: str) -> None:
    with pytest.raises(ValueError, match="WINDLASS_SIM") as caught:
        parse_settings(text)
    assert str(caught.value).startswith(wanted)
