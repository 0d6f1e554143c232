"""Workers for tests/ranks/test_qk_clip.py, and what they train; their oracle is in qk_clip_oracle.py.

The attentions of the model stand beside each other, not on each other: what one does to its queries and keys leaves
the logits of the others as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import windlass
from windlass.conformance.opening import opened
from windlass.conformance.training import config_of, my_part, windlass_ranks
from windlass.functional import HeadRows, QKProbe, attention

WIDTH, HEADS, LENGTH, ROWS = 16, 4, 6, 8
TAU, LR, DECAY, MU = 1.5, 0.02, 0.1, 0.9
EPS = 1e-3  # of AdamW: softmax ignores a bias of keys, whose gradient is noise that is not to become a step
Attend = Callable[[Tensor, Tensor, Tensor, QKProbe], Tensor]


def attend(query: Tensor, key: Tensor, value: Tensor, probe: QKProbe) -> Tensor:
    return attention(query, key, value, probe, causal=True)


def attend_by_hand(query: Tensor, key: Tensor, value: Tensor, probe: QKProbe) -> Tensor:
    """As an attention of the user's own, whose kernel gives the maxima away."""
    key, value = (one.repeat_interleave(probe.heads // probe.key_heads, 1) for one in (key, value))
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    logits = logits.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
    output: Tensor = logits.softmax(-1) @ value
    probe.observe(logits.detach().amax((0, 2, 3)), output)
    return output


def split(x: Tensor, heads: int) -> Tensor:
    """[batch, heads, length, size]"""
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)
        rows = WIDTH // HEADS
        self.probe = QKProbe(
            HeadRows("query_key_value.weight", rows),
            HeadRows("query_key_value.weight", rows, first=WIDTH),
            heads=HEADS,
        )

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        query, key, value = (split(one, HEADS) for one in self.query_key_value(x).chunk(3, -1))
        return attend(query, key, value, self.probe).transpose(1, 2).flatten(2)


class Grouped(nn.Module):
    KEY_HEADS = 2

    def __init__(self) -> None:
        super().__init__()
        rows = WIDTH // HEADS
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, self.KEY_HEADS * rows, bias=False)
        self.value = nn.Linear(WIDTH, self.KEY_HEADS * rows, bias=False)
        query, key = HeadRows("query.weight", rows), HeadRows("key.weight", rows)
        self.probe = QKProbe(query, key, heads=HEADS, key_heads=self.KEY_HEADS)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        query, key, value = split(self.query(x), HEADS), split(self.key(x), 2), split(self.value(x), 2)
        return attend(query, key, value, self.probe).transpose(1, 2).flatten(2)


class Latent(nn.Module):
    """Multi-head latent attention: heads lie between other rows, and all share the rotary key."""

    PLAIN, ROTARY = 4, 2

    def __init__(self) -> None:
        super().__init__()
        step = self.PLAIN + self.ROTARY
        self.query = nn.Linear(WIDTH, HEADS * step, bias=False)
        self.key_value = nn.Linear(WIDTH, HEADS * 2 * self.PLAIN, bias=False)
        self.rotary_key = nn.Linear(WIDTH, self.ROTARY, bias=False)
        self.probe = QKProbe(
            HeadRows("query.weight", self.PLAIN, stride=step),
            HeadRows("key_value.weight", self.PLAIN, stride=2 * self.PLAIN),
            heads=HEADS,
            query_alone=HeadRows("query.weight", self.ROTARY, first=self.PLAIN, stride=step),
        )

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        key, value = split(self.key_value(x), HEADS).chunk(2, -1)
        shared = split(self.rotary_key(x), 1).expand(-1, HEADS, -1, -1)
        return (
            attend(split(self.query(x), HEADS), torch.cat((key, shared), -1), value, self.probe)
            .transpose(1, 2)
            .flatten(2)
        )


class Net(nn.Module):
    def __init__(self, attend: Attend, checkpoints: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.attend, self.checkpoints = attend, checkpoints
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.attentions = nn.ModuleList([Fused(), Grouped(), Latent()])
        self.head = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            for each in self.attentions:
                for name, one in each.named_parameters():
                    height = 2 * WIDTH if isinstance(each, Fused) else len(one)  # values are not to grow
                    if name != "value.weight":  # later heads have larger logits than earlier ones
                        size = torch.linspace(1.0, 4.0, height).view(-1, *[1] * (one.dim() - 1))
                        one[:height] *= size

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        mixed = []
        for index, one in enumerate(self.attentions):
            if self.checkpoints and index < 2:
                mixed.append(checkpoint(one, x, self.attend, use_reentrant=bool(index)))
            else:
                mixed.append(one(x, self.attend))
        output: Tensor = self.head(torch.stack(mixed).sum(0))
        return output


def inputs(step: int) -> Tensor:
    return torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(step))


def loss_of(output: Tensor) -> Tensor:
    return (output - torch.linspace(-1, 1, WIDTH)).float().pow(2).mean()


def configure(
    stage: int, accumulation: int, qk_clip: float | None = TAU, lr: float = LR, **more: Any
) -> dict[str, Any]:
    params = {"lr": lr, "weight_decay": DECAY, "momentum": MU, "eps": EPS}
    given = {
        "optimizer": {"type": "Muon", "params": params},
        "muon": {"ns_dtype": "fp32", "qk_clip": qk_clip},
        "gradient_clipping": 0.0,
    }
    return config_of(stage, accumulation, windlass_ranks(), rows=ROWS, **{**given, **more})


def train(engine: windlass.Engine, steps: int, first: int = 0) -> None:
    accumulation = engine.config.gradient_accumulation_steps
    for step in range(first, first + steps):
        for micro in range(accumulation):
            x = my_part(inputs(step), engine.rank, engine.num_ranks, micro, accumulation)
            engine.backward(loss_of(engine(x)))
            engine.step()


def train_stages(
    stages: list[int], accumulations: list[int], steps: int, net: dict[str, Any]
) -> dict[Any, dict[str, Any]]:
    """What each came to, and what its last step left in the books beside what was planned."""
    results = {}
    with opened() as accelerator:
        for stage in stages:
            for accumulation in accumulations:
                config = configure(stage, accumulation)
                model = Net(**{"attend": attend, **net})
                with windlass.initialize(model, config, accelerator=accelerator) as engine:
                    train(engine, steps - 1)
                    accelerator.counters.reset()
                    train(engine, 1, first=steps - 1)
                    tallies = accelerator.counters.collectives.items()
                    results[stage, accumulation] = {
                        "measured": {key: (tally.calls, tally.bytes) for key, tally in tallies},
                        "predicted": engine.plan.prediction.step(accumulation, engine.rank),
                        "host_reads": accelerator.counters.host_reads,
                        "state": engine.full_state_dict(),
                    }
    return results


def train_three_ways(stages: list[int]) -> dict[int, list[dict[str, Tensor]]]:
    """Without QK-clip, with a bound that nothing reaches, and with one where the update is captured or not."""
    results = {}
    with opened() as accelerator:
        for stage in stages:
            states = []
            for more in ({"qk_clip": None}, {"qk_clip": 1e9}, {}, {"capture_update": True}):
                config = configure(stage, 1, **more)
                with windlass.initialize(Net(attend), config, accelerator=accelerator) as engine:
                    train(engine, 2)
                    states.append(engine.full_state_dict())
            results[stage] = states
    return results


def train_with_interruptions(stages: list[int]) -> dict[int, dict[str, Tensor]]:
    """Passes that must not count, with inputs that make logits huge: of evaluation, with gradients and without, of a
    step that was dropped and of one that was void."""
    results = {}
    with opened() as accelerator:
        for stage in stages:
            with windlass.initialize(Net(attend), configure(stage, 1), accelerator=accelerator) as engine:
                huge = 50 * my_part(inputs(9), engine.rank, engine.num_ranks, 0, 1)
                train(engine, 1)
                with torch.no_grad():
                    engine(huge)
                engine(huge)
                engine.backward(loss_of(engine(huge)))
                engine.zero_grad()
                before = engine.full_state_dict()
                engine.backward(loss_of(engine(huge)) * (math.inf if engine.rank == 0 else 1.0))
                assert not engine.step()
                assert all(torch.equal(value, before[name]) for name, value in engine.full_state_dict().items())
                train(engine, 2, first=1)
                results[stage] = engine.full_state_dict()
    return results


def shrink(stages: list[int], more: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """One step at a learning rate of 0: only QK-clip changes anything."""
    results = {}
    with opened() as accelerator:
        for stage in stages:
            config = configure(stage, 1, lr=0.0, **more)
            with windlass.initialize(Net(attend), config, accelerator=accelerator) as engine:
                before, momentum = engine.full_state_dict(), "attentions.1.query.weight"
                train(engine, 1)
                state = engine.executor.state
                for region in engine.plan.regions:
                    low = state.owned_low(region)
                    assert low is None or torch.equal(low, state.owned_fp32(region).to(low.dtype)), region.name
                results[stage] = {
                    "before": before,
                    "state": engine.full_state_dict(),
                    "momentum": engine.full_optimizer_state(momentum)["momentum"],
                    "narrow": {str(one.dtype) for one in engine.module.parameters()},
                }
    return results


def raise_unfed(stage: int) -> str:
    """The probe is never told anything."""
    model = Net(lambda query, key, value, probe: attention(query, key, value, causal=True))
    try:
        with windlass.initialize(model, configure(stage, 1)) as engine:
            train(engine, 1)
    except RuntimeError as error:
        return str(error)
    raise AssertionError("a step was taken though no logits were observed")
