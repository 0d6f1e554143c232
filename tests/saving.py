"""Workers for tests/ranks/test_checkpoint.py."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch

import windlass
from windlass.conformance.models import build
from windlass.conformance.training import config_of, train_engine, windlass_ranks


def start(stage: int, model: str = "Tied", **more: Any) -> windlass.Engine:
    more.setdefault("scheduler", {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 4}})
    return windlass.initialize(build(model), config_of(stage, 1, windlass_ranks(), **more))


def everything(engine: windlass.Engine) -> dict[str, Any]:
    """All that must survive: weights, moments, counts, the schedule."""
    names = [name for name, _ in engine.module.named_parameters()]
    return {
        "weights": engine.full_state_dict(),
        "moments": {name: engine.full_optimizer_state(name) for name in names},
        "facts": (engine.global_steps, engine.skipped_steps, engine.loss_scale, engine.lr),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return set(one) == set(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def save(folder: str, stage: int, more: dict[str, Any]) -> dict[str, Any]:
    with start(stage, **more) as engine:
        train_engine(engine, 3)
        engine.accelerator.seed(11 + engine.rank)
        path = engine.save_checkpoint(folder, client_state={"epoch": 2})
        assert path == Path(folder) / "step3"
        draws = torch.rand(4)
        return {**everything(engine), "draws": draws}


def load(folder: str, stage: int, more: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Load into freshly initialised, differently seeded weights; then train on."""
    with start(stage, **more) as engine:
        train_engine(engine, 1, first=90)
        assert engine.load_checkpoint(folder) == {"epoch": 2}
        loaded = everything(engine)
        assert same({key: saved[key] for key in loaded}, loaded)
        if engine.rank == 0:
            assert torch.equal(torch.rand(4), saved["draws"])
        train_engine(engine, 2, first=3)
        return everything(engine)


def load_for_another_optimizer(folder: str, stage: int, more: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What was loaded, and what was told about it."""
    told: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("windlass")
    with start(stage, **more) as engine:
        train_engine(engine, 1, first=90)  # so that there is something to forget
        level = logger.level
        logger.addHandler(listener)
        logger.setLevel(logging.INFO)
        try:
            engine.load_checkpoint(folder)
        finally:
            logger.removeHandler(listener)
            logger.setLevel(level)
        loaded = everything(engine)
        train_engine(engine, 1, first=3)
        return loaded, told


def train_through(stage: int, more: dict[str, Any]) -> dict[str, Any]:
    with start(stage, **more) as engine:
        train_engine(engine, 5)
        return everything(engine)


def expect_error(folder: str, model: str, message: str) -> None:
    """A checkpoint that does not fit or is damaged: every rank says so, and goes on with what it had."""
    import pytest

    with start(1, model) as engine:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            engine.load_checkpoint(folder)
        norms = train_engine(engine, 1)
        assert math.isfinite(norms[0])
