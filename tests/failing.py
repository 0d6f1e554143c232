"""Workers for tests/ranks/test_failures.py."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from torch import Tensor

import windlass
from windlass.conformance.training_workers import part_of, start

SOON = 20.0  # seconds; the others must know long before any timeout of the surroundings


def _expect_loss_of_peer(engine: windlass.Engine, name: str) -> str:
    began = time.monotonic()
    with pytest.raises(windlass.WindlassError, match=name) as caught:
        _train_on(engine)
    assert time.monotonic() - began < SOON
    assert "\n" not in str(caught.value)
    return "named"


def _train_on(engine: windlass.Engine) -> None:
    for step in range(5):
        engine.backward(engine(*part_of(engine, step)))
        engine.step()


def die_in_mid_step(stage: int) -> str:
    engine = start(stage)
    if engine.rank == 1:
        block = engine.module.blocks[1]  # type: ignore[index]
        block.norm.weight.register_hook(_kill_this_process)  # type: ignore[union-attr]
        _train_on(engine)
    return _expect_loss_of_peer(engine, "rank 1")


def _kill_this_process(_: Tensor) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang_in_mid_step(stage: int) -> str:
    os.environ["WINDLASS_TIMEOUT"] = "3"
    engine = start(stage)
    if engine.rank == 1:
        engine.backward(engine(*part_of(engine, 0)))
        time.sleep(8)
        return "slept"
    return _expect_loss_of_peer(engine, "rank 1")


def never_arrive() -> str:
    os.environ["WINDLASS_TIMEOUT"] = "3"
    if os.environ["RANK"] == "1":
        time.sleep(8)
        return "stayed away"
    began = time.monotonic()
    with pytest.raises(windlass.CollectiveTimeout, match="2 ranks") as caught:
        start(1)
    assert time.monotonic() - began < SOON
    assert "\n" not in str(caught.value)
    return "told"


def raise_on_one_rank(stage: int) -> str:
    engine = start(stage)
    if engine.rank == 1:
        engine(*part_of(engine, 0))
        engine.close()
        raise ArithmeticError("only here")
    assert torch.is_grad_enabled()
    return _expect_loss_of_peer(engine, "rank 1")
