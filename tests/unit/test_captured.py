"""What is captured is remembered by what it is made of, and what changes from step to step stays where it is."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import windlass
from windlass.accelerator.interface import Accelerator, TensorFunction
from windlass.backends.cpu.device import open_cpu
from windlass.config import load_config
from windlass.core.captured import Issuer
from windlass.planning import plan_for


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    opened = open_cpu()
    yield opened
    opened.close()


class Captures:
    """An `Accelerator.capture` that counts, and gives the function back."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.made = 0
        accelerator.capture = self.capture  # type: ignore[method-assign]

    def capture(self, function: TensorFunction) -> TensorFunction:
        self.made += 1
        return function


def scale(factor: int, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [factor * one for one in tensors]


def test_functions_are_captured_once_for_each_name_and_structure(accelerator: Accelerator) -> None:
    captures, issuer = Captures(accelerator), Issuer(accelerator, captures=True)
    for value in (1.0, 2.0):
        for factor in (2, 3):
            (result,) = issuer.run("scale", scale, factor, [torch.tensor(value)])
            assert result == factor * value
    assert captures.made == 2
    issuer.run("another", scale, 2, [torch.ones(1)])
    assert captures.made == 3


def test_recordings_do_not_pile_up(accelerator: Accelerator) -> None:
    """The sixteen functions that were used last are remembered."""
    captures, issuer = Captures(accelerator), Issuer(accelerator, captures=True)
    for factor in range(17):
        issuer.run("scale", scale, 0, [torch.ones(1)])
        issuer.run("scale", scale, factor, [torch.ones(1)])
    assert captures.made == 17
    issuer.run("scale", scale, 0, [torch.ones(1)])
    assert captures.made == 17
    issuer.run("scale", scale, 1, [torch.ones(1)])
    assert captures.made == 18


def test_values_change_and_their_place_does_not(accelerator: Accelerator) -> None:
    issuer = Issuer(accelerator, captures=True)
    first = issuer.keep("rate", torch.tensor([1.0, 2.0]))
    other = issuer.keep("scale", torch.tensor([5.0, 6.0]))
    again = issuer.keep("rate", torch.tensor([3.0, 4.0]))
    assert first is again
    assert first.tolist() == [3.0, 4.0]
    assert other.tolist() == [5.0, 6.0]
    assert issuer.keep("rate", torch.tensor([7.0])).shape == (1,)
    assert first.tolist() == [3.0, 4.0]


def test_an_engine_that_is_closed_lets_recordings_go(accelerator: Accelerator) -> None:
    """At once, and not when somebody collects garbage: they hold memory on the device."""
    recordings: list[weakref.ref[TensorFunction]] = []

    def capture(function: TensorFunction) -> TensorFunction:
        def recording(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            return function(tensors)

        recordings.append(weakref.ref(recording))
        return recording

    accelerator.capture = capture  # type: ignore[method-assign]
    gc.disable()
    try:
        engine = windlass.initialize(torch.nn.Linear(3, 1), {"capture_update": True}, accelerator=accelerator)
        engine.backward(engine(torch.ones(1, 3)).sum())
        assert engine.step()
        assert [one() is None for one in recordings] == [False, False]
        engine.close()
        assert [one() is None for one in recordings] == [True, True]
    finally:
        gc.enable()


def test_nothing_is_captured_unless_asked_for(accelerator: Accelerator) -> None:
    captures, issuer = Captures(accelerator), Issuer(accelerator, captures=False)
    value = torch.ones(2)
    assert issuer.keep("rate", value) is value
    assert issuer.run("scale", scale, 2, [value])[0].tolist() == [2.0, 2.0]
    assert captures.made == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"views": False, "one_sided": False}, "its buffers are made anew for each use"),
        (
            {"views": False, "one_sided": False, "lazy": True, "uniform_program": True},
            "it compiles and runs whole steps as one program anyway",
        ),
    ],
)
def test_device_that_makes_nothing_of_it_says_so(
    accelerator: Accelerator, changes: dict[str, bool], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    captures = Captures(accelerator)
    accelerator.capabilities = replace(accelerator.capabilities, **changes)  # type: ignore[arg-type]
    config = {"train_batch_size": 2, "capture_update": True}
    with windlass.initialize(torch.nn.Linear(3, 1), config, accelerator=accelerator) as engine:
        engine.backward(engine(torch.ones(2, 3)).sum())
        assert engine.step()
        assert engine.plan.rules.issue == "anew"
    assert [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING] == [
        f"capture_update has no effect on {accelerator.name}: {told}; results are the same"
    ]
    assert captures.made == 0


def test_configuration_asks_for_it() -> None:
    model = torch.nn.Linear(3, 1)
    for asked in (False, True):
        plan = plan_for(model, load_config({"capture_update": asked}, 1))
        assert plan.rules.issue == ("captured" if asked else "anew")


@pytest.mark.parametrize(
    ("section", "dtype"),
    [
        ({"enabled": True, "bf16_optimizer_states": True}, "bfloat16"),
        ({"enabled": False, "bf16_optimizer_states": True}, "float32"),
        ({"enabled": True}, "float32"),
    ],
)
def test_configuration_asks_for_moments_of_16_bits(section: dict[str, bool], dtype: str) -> None:
    config = load_config({"bf16": section, "seed": 5}, 1)
    assert config.messages == ()
    plan = plan_for(torch.nn.Linear(3, 1), config)
    assert plan.moment_dtype == dtype
    assert plan.noise_seed == (5 if dtype == "bfloat16" else 0)
