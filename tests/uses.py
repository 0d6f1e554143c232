"""Workers for tests/ranks/test_uses.py: what users do with engines beyond the plain loop."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

import windlass
from events import assert_like_oracle, finish_plain_step, plain_step
from windlass.conformance.models import Frozen, Network, batch, build
from windlass.conformance.training import LR, WEIGHT_DECAY, config_of, distance, my_part, train_engine, windlass_ranks
from windlass.conformance.training_workers import ROWS, part_of, start


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LR, weight_decay=WEIGHT_DECAY)


def backward_twice_through_one_graph(stage: int) -> None:
    """A retained graph, gone through again: every unit is gathered for the second pass too."""
    module = build("Network")
    optimizer = adamw(module)
    with start(stage) as engine:
        for step in range(3):
            loss = engine(*part_of(engine, step))
            (0.75 * loss).backward(retain_graph=True)
            (0.25 * loss).backward()
            assert engine.step()
            plain_step(module, optimizer, step)
        assert_like_oracle(engine, module.state_dict())


def two_losses_per_micro_batch(stage: int) -> None:
    """How many backward passes a micro-batch has does not move the boundary."""
    module = build("Network")
    optimizer = adamw(module)
    with start(stage, accumulation=2) as engine:
        for step in range(2):
            ids, targets = batch(step, ROWS)
            for micro in range(2):
                x, y = (my_part(t, engine.rank, engine.num_ranks, micro, 2) for t in (ids, targets))
                loss = engine(x, y)
                (0.25 * loss).backward(retain_graph=True)
                engine.backward(0.5 * loss)
                assert engine.step() == (micro == 1)
            plain_step(module, optimizer, step)
        assert_like_oracle(engine, module.state_dict())


def one_step_after_all_micro_batches(stage: int) -> None:
    """As in PyTorch: several micro-batches, then one call of step()."""
    module = build("Network")
    optimizer = adamw(module)
    with start(stage, accumulation=4) as engine:
        for step in range(2):
            ids, targets = batch(step, ROWS)
            for micro in range(4):
                x, y = (my_part(t, engine.rank, engine.num_ranks, micro, 4) for t in (ids, targets))
                engine.backward(engine(x, y))
            assert engine.step()
            plain_step(module, optimizer, step)
        assert_like_oracle(engine, module.state_dict())


def rank_without_a_backward(stage: int) -> None:
    """A rank whose data has ended still steps: it adds zeros to the mean."""
    module = build("Network")
    optimizer = adamw(module)
    with start(stage) as engine:
        x, y = part_of(engine, 0)
        if engine.rank == 0:
            engine.backward(engine(x, y))
        assert engine.step()
        ids, targets = batch(0, ROWS)
        (module(*(my_part(t, 0, engine.num_ranks, 0, 1) for t in (ids, targets))) / engine.num_ranks).backward()
        finish_plain_step(module, optimizer)
        assert_like_oracle(engine, module.state_dict())
        assert not engine.step()  # nobody has a gradient
        assert (engine.global_steps, engine.skipped_steps) == (1, 0)


def evaluate_in_inference_mode(stage: int) -> None:
    module = build("Network")
    optimizer = adamw(module)
    with start(stage) as engine:
        for step in range(2):
            with torch.inference_mode():
                engine(*batch(5, 4))
            train_engine(engine, 1, first=step)
            plain_step(module, optimizer, step)
        assert_like_oracle(engine, module.state_dict())


class WithPrior(Network):
    """A parameter that the loss also reads without the engine."""

    def __init__(self) -> None:
        super().__init__(layers=2)
        self.prior = nn.Parameter(torch.full((4,), 0.5))

    def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> Any:
        return super().forward(ids, targets) + self.prior.sum()


def plain_backward_in_fp16(stage: int) -> None:
    """Gradients of loss.backward() carry no loss scale, wherever they come from and whatever failed before."""
    torch.manual_seed(0)
    module = WithPrior()
    fp16 = {"enabled": True, "initial_scale_power": 8}
    with windlass.initialize(module, config_of(stage, 1, windlass_ranks(), ROWS, fp16=fp16)) as engine:
        x, y = part_of(engine, 0)
        loss = engine(x, y)
        loss.register_hook(_fail)
        with pytest.raises(ArithmeticError):
            loss.backward()
        engine.zero_grad()
        (engine(x, y) + module.prior.float().square().sum()).backward()
        assert torch.allclose(engine.full_gradient("prior"), torch.full((4,), 2.0), rtol=1e-3)
        assert engine.step()
        engine.backward(engine(x, y))
        assert torch.allclose(engine.full_gradient("prior"), torch.ones(4), rtol=1e-3)


def _fail(_: torch.Tensor) -> None:
    raise ArithmeticError


def frozen_weights_in_bf16_come_from_rank_0(stage: int) -> None:
    """Frozen parameters are cast and shared like the others, though nothing of theirs is updated."""
    torch.manual_seed(100 + int(os.environ["RANK"]))
    module = Frozen()
    with windlass.initialize(module, config_of(stage, 1, windlass_ranks(), ROWS, bf16={"enabled": True})) as engine:
        train_engine(engine, 2)
        sums = [engine.mean_over_ranks(value.float().sum()) for value in engine.full_state_dict().values()]
        own = [float(value.float().sum()) for value in engine.full_state_dict().values()]
        assert own == pytest.approx(sums, rel=1e-5, abs=1e-5)
        assert {value.dtype for value in engine.module.state_dict().values()} == {torch.bfloat16}


def many_backwards_in_bf16(stage: int) -> None:
    """More gradients than planned add up in fp32, not in the weights' dtype."""
    with start(stage, bf16={"enabled": True}, gradient_clipping=0) as engine:
        x, y = part_of(engine, 0)
        engine.backward(engine(x, y))
        once = engine.full_gradient("blocks.1.up.weight")
        for _ in range(255):
            engine.backward(engine(x, y))
        apart = engine.full_gradient("blocks.1.up.weight") / 256 - once
        assert float(apart.norm() / once.norm()) < 4e-3  # one rounding to bf16, not 255
        assert engine.step()


def stale_and_changed_models_are_refused(stage: int) -> None:
    with start(stage) as engine:
        first, second = (engine(*part_of(engine, step)) for step in range(2))
        engine.backward(first)
        assert engine.step()
        with pytest.raises(RuntimeError, match="an optimizer step has changed since the forward pass"):
            second.backward()
        engine.zero_grad()
        engine.module.double()
        with pytest.raises(RuntimeError, match="cast and move the model before initialize"):
            engine(*part_of(engine, 0))


class KeepsFeature(Network):
    """A block's inside is kept as an attribute, where a loss can read it."""

    def __init__(self) -> None:
        super().__init__(layers=4)
        self.get_submodule("blocks.1.up").register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, given: Any, output: torch.Tensor) -> None:
        self.feature = output


def ways_round_a_units_outputs_are_refused(stage: int) -> None:
    """Gathered weights are there for gradients that come through outputs; other ways work at the other stages."""
    with windlass.initialize(KeepsFeature(), config_of(stage, 1, windlass_ranks(), ROWS)) as engine:
        loss, feature = engine(*part_of(engine, 0)), engine.module.feature
        assert isinstance(feature, torch.Tensor)
        if stage == 3:
            with pytest.raises(RuntimeError, match="without passing through its outputs"):
                feature.square().mean().backward()
            engine.zero_grad()
            with pytest.raises(RuntimeError, match="use ZeRO stage 2 for second derivatives"):
                engine(*part_of(engine, 0)).backward(create_graph=True)
            return
        slope = torch.autograd.grad(loss, feature, create_graph=True)[0]
        slope.square().mean().backward()
        assert engine.step()
        engine(*part_of(engine, 1))
        feature = engine.module.feature
        assert isinstance(feature, torch.Tensor)
        feature.square().mean().backward()
        assert engine.step()


def parts_of_the_model_can_be_saved(stage: int) -> None:
    with start(stage) as engine:
        train_engine(engine, 1)
        full = engine.full_state_dict()
        for name, value in engine.module.get_submodule("blocks.2").state_dict().items():
            assert torch.equal(value, full[f"blocks.2.{name}"])


def schedulers_that_cannot_work_are_refused(stage: int) -> None:
    def wrong(module: nn.Module) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(adamw(module), 0.9)

    module, config = build("Network"), config_of(stage, 1, windlass_ranks(), ROWS)
    with pytest.raises(ValueError, match="drives another optimizer"):
        windlass.initialize(module, config, lr_scheduler=wrong(module))
    with pytest.raises(ValueError, match="ReduceLROnPlateau needs a metric"):
        windlass.initialize(build("Network"), config, lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)


def closed_shards_are_not_trained_on(stage: int) -> None:
    """After close a sharded module has no weights; where they are resident it can be initialised again."""
    module, config = build("Network"), config_of(stage, 1, windlass_ranks(), ROWS)
    windlass.initialize(module, config).close()
    if stage == 3:
        with pytest.raises(ValueError, match="load the model's weights again before initialize"):
            windlass.initialize(module, config)
    else:
        with windlass.initialize(module, config) as engine:
            train_engine(engine, 1)


def multi_step_schedule_resumes(folder: str) -> None:
    """Milestones are keys that are numbers: they survive the manifest."""

    def schedule(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])

    def begin() -> windlass.Engine:
        return windlass.initialize(build("Network"), config_of(1, 1, windlass_ranks(), ROWS), lr_scheduler=schedule)

    rates = []
    with begin() as engine:
        for step in range(5):
            if step == 1:
                engine.save_checkpoint(folder)
            train_engine(engine, 1, first=step)
            rates.append(engine.lr)
    with begin() as engine:
        engine.load_checkpoint(folder)
        for step in range(1, 5):
            train_engine(engine, 1, first=step)
            assert engine.lr == pytest.approx(rates[step])


def unsavable_client_state_is_refused_on_every_rank(folder: str) -> None:
    with start(1) as engine:
        with pytest.raises(ValueError, match="the state to save is not JSON"):
            engine.save_checkpoint(folder, client_state={"x": torch.zeros(1)})
        engine.save_checkpoint(folder, client_state={"x": 1})


def frozen_parameters_load_across_stages(folder: str) -> None:
    for written, read in ((3, 0), (1, 3)):
        with start(written, "Frozen") as engine:
            train_engine(engine, 1)
            saved = engine.full_state_dict()
            engine.save_checkpoint(folder, f"{written}")
        other = build("Frozen", seed=9)
        with windlass.initialize(other, config_of(read, 1, windlass_ranks(), ROWS)) as engine:
            engine.load_checkpoint(folder, f"{written}")
            assert max(distance(engine.full_state_dict(), saved).values()) == 0
