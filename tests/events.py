"""Workers for tests/ranks/test_training_events.py: each runs on every rank and asserts against plain PyTorch."""

from __future__ import annotations

import gc
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import windlass
from windlass.conformance.models import batch, build, loss_of
from windlass.conformance.training import (
    LR,
    WEIGHT_DECAY,
    config_of,
    distance,
    my_part,
    train_engine,
    train_oracle,
    windlass_ranks,
)
from windlass.conformance.training_workers import ROWS, part_of, start


def plain_step(module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One optimizer step of plain PyTorch on the whole batch."""
    ids, targets = batch(step, ROWS)
    loss_of(module(ids, targets)).backward()
    finish_plain_step(module, optimizer)


def finish_plain_step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def assert_like_oracle(engine: windlass.Engine, state: dict[str, Tensor], bound: float = 1e-6) -> None:
    worst = distance(engine.full_state_dict(), state)
    assert max(worst.values()) < bound, worst


def unfreeze_in_mid_run(stage: int) -> None:
    """Frozen parameters are left alone; once unfrozen they train, and nothing known is lost."""
    module = build("Frozen")
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    with start(stage, "Frozen") as engine:
        for step in range(6):
            if step == 3:
                module.requires_grad_(True)
                engine.module.requires_grad_(True)
            plain_step(module, optimizer, step)
            engine.backward(engine(*part_of(engine, step)))
            engine.step()
        assert_like_oracle(engine, module.state_dict())
        assert engine.full_optimizer_state("embedding.weight")["step"] == 3
        assert engine.full_optimizer_state("norm.weight")["step"] == 6


def parameter_groups_and_torch_scheduler(stage: int) -> None:
    """Groups with settings of their own, driven by one of torch's schedulers."""

    def groups(module: nn.Module) -> list[dict[str, Any]]:
        decayed = [p for p in module.parameters() if p.dim() > 1]
        plain = [p for p in module.parameters() if p.dim() <= 1]
        return [
            {"params": decayed, "weight_decay": 0.2, "betas": (0.8, 0.95)},
            {"params": plain, "weight_decay": 0.0, "lr": 3e-3, "eps": 1e-6},
        ]

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)

    module, trained = build("Network"), build("Network")
    optimizer = torch.optim.AdamW(groups(module), lr=LR, weight_decay=WEIGHT_DECAY)
    scheduler = schedule(optimizer)
    config = config_of(stage, 1, windlass_ranks(), ROWS)
    with windlass.initialize(trained, config, model_parameters=groups(trained), lr_scheduler=schedule) as engine:
        for step in range(5):
            assert engine.lr == pytest.approx(optimizer.param_groups[0]["lr"])
            plain_step(module, optimizer, step)
            scheduler.step()
            engine.backward(engine(*part_of(engine, step)))
            engine.step()
        assert_like_oracle(engine, module.state_dict())


def own_torch_optimizer(stage: int) -> None:
    """A torch Adam (L2 in the gradient) given by the user: its groups and its arithmetic rule."""
    module, trained = build("Network"), build("Network")
    arguments: dict[str, Any] = {"lr": LR, "weight_decay": 0.1, "betas": (0.7, 0.9)}
    optimizer = torch.optim.Adam(module.parameters(), **arguments)
    own = torch.optim.Adam(trained.parameters(), **arguments)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(own, 0.9)
    reference = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    config = config_of(stage, 1, windlass_ranks(), ROWS)
    with windlass.initialize(trained, config, optimizer=own, lr_scheduler=scheduler) as engine:
        for step in range(4):
            plain_step(module, optimizer, step)
            reference.step()
            engine.backward(engine(*part_of(engine, step)))
            engine.step()
        assert_like_oracle(engine, module.state_dict())


def build_on_meta(stage: int) -> None:
    """A model without memory gets rank 0's initialisation, and trains."""
    with torch.device("meta"):
        module = build("Tied")
    torch.manual_seed(100 + windlass_ranks())
    config = config_of(stage, 1, windlass_ranks(), ROWS)
    with windlass.initialize(module, config) as engine:
        first = engine.full_state_dict()
        assert first["embedding.weight"].std() > 0.5
        assert torch.equal(first["embedding.weight"], first["head.weight"])
        plain = build("Tied")
        plain.load_state_dict(first)
        optimizer = torch.optim.AdamW(plain.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
        for step in range(3):
            plain_step(plain, optimizer, step)
        train_engine(engine, 3)
        assert_like_oracle(engine, plain.state_dict())


def train_compiled(stage: int) -> None:
    """torch.compile(model) before initialize; names keep torch's own prefix."""
    module = torch.compile(build("Network"), backend="aot_eager")
    config = config_of(stage, 1, windlass_ranks(), ROWS)
    with windlass.initialize(module, config) as engine, warnings.catch_warnings():  # type: ignore[arg-type]
        # The compiler itself looks at .grad of tensors that it meets where a module with hooks is called.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        train_engine(engine, 3)
        state = {name.removeprefix("_orig_mod."): value for name, value in engine.full_state_dict().items()}
        worst = distance(state, train_oracle("Network", 3)[0])
        assert max(worst.values()) < 1e-6, worst


def gradients_and_state_in_full(stage: int) -> None:
    """full_gradient and full_optimizer_state in logical shape, as plain PyTorch has them; asking changes nothing."""
    module = build("Network")
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    with start(stage) as engine:
        for step in range(3):
            ids, targets = batch(step, ROWS)
            module(ids, targets).backward()
            engine.backward(engine(*part_of(engine, step)))
            for name in ("embedding.weight", "blocks.1.up.bias", "norm.weight"):
                want = module.get_parameter(name).grad
                assert want is not None
                assert torch.allclose(engine.full_gradient(name), want, rtol=1e-5, atol=1e-8)
            finish_plain_step(module, optimizer)
            engine.step()
        for name, parameter in module.named_parameters():
            got, want_state = engine.full_optimizer_state(name), optimizer.state[parameter]
            assert got["step"] == int(want_state["step"]) == 3
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.allclose(got[key], want_state[key], rtol=1e-4, atol=1e-9)
        assert_like_oracle(engine, module.state_dict())


def close_gives_back(stage: int) -> None:
    """After close there are no hooks and no bytes; where weights are resident the module still works."""
    module = build("Network")
    engine = windlass.initialize(module, config_of(stage, 1, windlass_ranks(), ROWS))
    train_engine(engine, 1)
    full = engine.full_state_dict()
    engine.close()
    engine.close()
    gc.collect()
    assert engine.accelerator.memory.stats().used.value == 0
    for inner in module.modules():
        assert not inner._forward_hooks
        assert not inner._forward_pre_hooks
        assert type(inner._parameters) is dict
    if stage < 3:
        assert all(torch.equal(module.state_dict()[name], full[name]) for name in full)
    with pytest.raises(RuntimeError, match="closed"):
        engine(*batch(0, 4))


def dropped_gradients_leave_no_trace(stage: int) -> None:
    with start(stage) as engine:
        train_engine(engine, 1)
        x, y = part_of(engine, 7)
        engine.backward(engine(x, y) * 100.0)
        engine.zero_grad()
        assert not engine.step()
        train_engine(engine, 2, first=1)
        assert_like_oracle(engine, train_oracle("Network", 3)[0])


def two_engines_in_one_process(stage: int) -> None:
    """No global state: two engines on one accelerator, and one loss through both."""
    accelerator = windlass.open_accelerator()
    config = config_of(stage, 1, windlass_ranks(), ROWS)
    plain = [build("Network", seed) for seed in (0, 1)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=LR, weight_decay=WEIGHT_DECAY) for m in plain]
    engines = [windlass.initialize(build("Network", seed), config, accelerator=accelerator) for seed in (0, 1)]
    for step in range(3):
        ids, targets = batch(step, ROWS)
        (plain[0](ids, targets) * plain[1](ids, targets).detach() + plain[1](ids, targets)).backward()
        for module, optimizer in zip(plain, optimizers, strict=True):
            finish_plain_step(module, optimizer)
        x, y = part_of(engines[0], step)
        with torch.no_grad():
            weight = engines[0].mean_over_ranks(engines[1](x, y))
        (engines[0](x, y) * weight + engines[1](x, y)).backward()
        assert all([engine.step() for engine in engines])
    for engine, module in zip(engines, plain, strict=True):
        assert_like_oracle(engine, module.state_dict(), bound=2e-6)
        engine.close()
    assert accelerator.memory.stats().used.value == 0
    accelerator.close()


class _Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4, sparse=True)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.embedding(ids).sum()
        return result


def refuse_sparse_gradient() -> None:
    with windlass.initialize(_Sparse(), {"train_batch_size": 1}) as engine:
        loss = engine(torch.tensor([1, 2]))
        with pytest.raises(TypeError, match=r"'embedding\.weight' is sparse"):
            engine.backward(loss)


def different_backward_counts(stage: int) -> None:
    """Where units are reduced in every backward, ranks that disagree on their number are told within seconds."""
    engine = start(stage)
    began = time.monotonic()
    with pytest.raises(windlass.WindlassError):
        _train_with_more_backwards_on_rank_1(engine)
    assert time.monotonic() - began < 20


def _train_with_more_backwards_on_rank_1(engine: windlass.Engine) -> None:
    for _ in range(3):
        for _ in range(1 + engine.rank):
            engine.backward(engine(*part_of(engine, 0)))
        engine.step()


def different_backward_counts_work(stage: int) -> None:
    """Where the reduction waits for the boundary, every backward of every rank counts."""
    module = build("Network")
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    with start(stage) as engine:
        ids, targets = batch(0, ROWS)
        for _ in range(1 + engine.rank):
            engine(*part_of(engine, 0)).backward()
        assert engine.step()
        for rank in range(engine.num_ranks):
            x, y = (my_part(t, rank, engine.num_ranks, 0, 1) for t in (ids, targets))
            for _ in range(1 + rank):
                (module(x, y) / engine.num_ranks).backward()
        finish_plain_step(module, optimizer)
        assert_like_oracle(engine, module.state_dict())


def loss_and_wish_to_stop_travel_with_the_step(stage: int) -> None:
    """The mean loss over ranks and micro-steps, and one rank's wish to stop, known everywhere after one host read."""
    plain = build("Network")
    with start(stage, accumulation=2) as engine:
        reads = engine.accelerator.counters
        for step in range(3):
            ids, targets = batch(step, ROWS)
            if step == 1 and engine.rank == 1:
                engine.request_stop()
            before = reads.host_reads
            plain.load_state_dict(engine.full_state_dict())
            for micro in range(2):
                x, y = (my_part(t, engine.rank, engine.num_ranks, micro, 2) for t in (ids, targets))
                engine.backward(engine(x, y))
                engine.step()
            loss = engine.loss
            assert reads.host_reads == before + 1
            with torch.no_grad():
                assert loss == pytest.approx(float(plain(ids, targets)), rel=1e-5)
            assert engine.stop_requested == (step >= 1)
