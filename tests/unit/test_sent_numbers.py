"""A host that sends numbers waits for the device: before the step's read it sends those only that are new."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn

import windlass
from windlass.core.scalars import LastSent
from windlass.core.statistics import StatisticsExchange


def test_what_was_sent_is_not_sent_again() -> None:
    accelerator = windlass.open_accelerator("cpu")
    sent = LastSent(accelerator)
    first = sent.send([1.0, 2.0])
    assert sent.send((1.0, 2.0)) is first
    assert first.tolist() == [1.0, 2.0]
    assert first.dtype is torch.float32
    for values in ([1.0], [1.0, 3.0], [1.0, 2.0]):
        other = sent.send(values)
        assert other is not first
        assert other.tolist() == values


class Branches(nn.Module):
    """Takes one branch or both, so that other parameters have gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        left: torch.Tensor = self.left(x).sum()
        return torch.add(left, self.right(x).sum()) if both else left


def test_like_steps_send_nothing_before_their_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of the host's numbers between the end of backward and the read; the learning rates come later."""
    made: list[list[Any]] = []
    read, tensor = StatisticsExchange.read, torch.tensor
    config = {"fp16": {"enabled": True, "initial_scale_power": 4, "hysteresis": 1}, "gradient_clipping": 0}
    with (
        contextlib.closing(windlass.open_accelerator("cpu")) as accelerator,
        windlass.initialize(Branches(), config, accelerator=accelerator) as engine,
    ):

        def watch(data: Any, *args: Any, **more: Any) -> torch.Tensor:
            made[-1].append(data)
            return tensor(data, *args, **more)

        def watch_until_read(self: StatisticsExchange, *args: Any) -> Any:
            result = read(self, *args)
            monkeypatch.setattr(torch, "tensor", tensor)
            return result

        monkeypatch.setattr(StatisticsExchange, "read", watch_until_read)
        for step, both in enumerate([True, True, True, False, False, False]):
            loss = engine(torch.ones(1, 3), both)
            engine.backward(loss * float("inf") if step == 4 else loss)
            made.append([])
            monkeypatch.setattr(torch, "tensor", watch)
            engine.step()
    # The first step sends all, the fourth what was touched, the last the loss scale that the step before has halved.
    assert [len(one) for one in made] == [2, 0, 0, 1, 0, 1]
