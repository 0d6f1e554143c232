"""What ranks do in the tests of training on XLA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch_xla
from torch import Tensor

import windlass
from windlass.accelerator.errors import BackendUnusable
from windlass.backends.xla import programs
from windlass.conformance.models import build
from windlass.conformance.opening import opened
from windlass.conformance.training import assert_equals_oracle, config_of, train_engine, windlass_ranks


def compare_every_program(stage: int, steps: int) -> tuple[int, int]:
    """Train in debug mode; in the steps after the first, how many programs were run, and how many of them without
    having been compared directly before."""
    events: list[str] = []
    hash_program, sync = programs.hash_program, torch_xla.sync

    def note_comparison(tensors: Sequence[Tensor]) -> str:
        events.append("compared")
        return hash_program(tensors)

    def note_run(*args: Any, **more: Any) -> None:
        before = programs.read_program_counts().executed
        sync(*args, **more)
        if programs.read_program_counts().executed > before:
            events.append("run")

    programs.hash_program, torch_xla.sync = note_comparison, note_run
    try:
        with opened() as accelerator:
            config = config_of(stage, 1, windlass_ranks())
            with windlass.initialize(build("Network"), config, accelerator=accelerator) as engine:
                train_engine(engine, 1)
                events.clear()
                train_engine(engine, steps - 1, first=1)
                steps_events = list(events)
        unseen = sum(
            event == "run" and (index == 0 or steps_events[index - 1] != "compared")
            for index, event in enumerate(steps_events)
        )
        return steps_events.count("run"), unseen
    finally:
        programs.hash_program, torch_xla.sync = hash_program, sync


def differ_in_the_model(stage: int) -> str:
    """In debug mode: a model that writes the rank into its program."""
    with opened() as accelerator:
        config = config_of(stage, 1, windlass_ranks())
        with windlass.initialize(build("Network"), config, accelerator=accelerator) as engine:
            from windlass.conformance.models import batch, loss_of

            ids, targets = (part.chunk(engine.num_ranks)[engine.rank] for part in batch(0, 48))
            loss = loss_of(engine(ids, targets))
            if engine.rank == 1:
                loss = loss + loss.detach()[None][0] * 0.5
            try:
                engine.backward(loss)
                engine.step()
            except windlass.WindlassError as error:
                return str(error)
            return ""


def save(stage: int, steps: int, directory: str) -> None:
    """Train and save."""
    with opened() as accelerator:
        config = config_of(stage, 1, windlass_ranks())
        with windlass.initialize(build("Network"), config, accelerator=accelerator) as engine:
            train_engine(engine, steps)
            engine.save_checkpoint(directory)


def load_and_train(stage: int, first: int, steps: int, directory: str) -> None:
    """Continue, and end where plain PyTorch ends that never stopped."""
    with opened() as accelerator:
        config = config_of(stage, 1, windlass_ranks())
        with windlass.initialize(build("Network", seed=9), config, accelerator=accelerator) as engine:
            engine.load_checkpoint(directory)
            assert engine.global_steps == first
            train_engine(engine, steps - first, first=first)
            assert_equals_oracle(engine.full_state_dict(), "Network", steps)


def open_after_a_backward() -> str:
    """What opening says in a process where autograd has begun without torch_xla."""
    torch.ones(2, requires_grad=True).sum().backward()
    with pytest.raises(BackendUnusable) as caught, opened():
        pass
    return str(caught.value)
