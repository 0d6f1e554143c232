"""Workers for tests/ranks/test_muon*.py: train with Muon on ranks, and say what that came to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import windlass
from muon_models import ROWS, VIEWS, batch_of, build, muon_names
from muon_oracle import ADAM_LR, DECAY, LR, MOMENTUM, Case, Trace, Verdict, replay
from windlass import planning
from windlass.accelerator.interface import Accelerator
from windlass.accelerator.kernels import Kernel
from windlass.conformance.opening import opened
from windlass.conformance.training import my_part
from windlass.core.muon_planner import MuonCosts
from windlass.core.planner import PlanSettings

STEPS = 3
SMALL_WAVE = 1024  # bytes: several waves, even in small models


@dataclass(frozen=True)
class Outcome:
    """What one rank has to tell of one case."""

    digest: str  # of the trace
    measured: dict[tuple[str, str], tuple[int, int]]
    predicted: dict[tuple[str, str], tuple[int, int]]
    by_tag: dict[str, int]
    persistent: dict[str, int]
    host_reads: int
    orthogonalised: int  # matrices, by this rank, in all steps
    waves: int
    verdict: Verdict | None  # of the rank that replayed it


def config_of(case: Case) -> dict[str, Any]:
    return {
        "train_batch_size": ROWS,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": case.clip,
        "optimizer": {
            "type": "Muon",
            "params": {"lr": LR, "adam_lr": ADAM_LR, "momentum": MOMENTUM, "weight_decay": DECAY},
        },
        "muon": {
            "ns_dtype": case.ns_dtype,
            "scale": case.scale,
            "coefficients": case.coefficients,
            "nesterov": case.nesterov,
            "views": VIEWS.get(case.model, {}),
        },
        "zero_optimization": {"stage": case.stage},
        **({} if case.precision == "fp32" else {case.precision: {"enabled": True}}),
    }


@contextmanager
def costs(own: bool = True, wave_bytes: int = SMALL_WAVE) -> Iterator[None]:
    """Plans as for large models: matrices have owners although they are small, and travel in several waves."""
    chosen = MuonCosts(flops_per_byte=0.0 if own else 1e9, wave_bytes=wave_bytes)
    with patch.object(planning, "PlanSettings", partial(PlanSettings, muon_costs=chosen)):
        yield


class PolarCount:
    """Counts the matrices that an accelerator's kernels orthogonalise. `alone`: each by itself, for kernels whose bits
    depend on what else is in the stack, as those of the reference."""

    def __init__(self, accelerator: Accelerator, *, alone: bool = False) -> None:
        self.matrices, self._alone = 0, alone
        for name in ("polar", "polar_gram"):
            chosen = accelerator.kernels.chosen()[name]
            (inner,) = (one for one in accelerator.kernels.implementations(name) if one.implementation == chosen)
            accelerator.kernels.register(Kernel(name, "counting", partial(self._count, inner.function), 10**6))

    def _count(self, inner: Any, stack: Tensor, *args: Any, **options: Any) -> Any:
        self.matrices += stack.shape[0]
        if self._alone:
            return torch.cat([inner(one, *args, **options) for one in stack.split(1)])
        return inner(stack, *args, **options)


def train_cases(cases: Sequence[Case], alone: bool = False) -> dict[Case, Outcome]:
    """Train every case; each is then replayed by one of the ranks."""
    outcomes = {}
    with opened() as accelerator:
        world, count = accelerator.collectives.world, PolarCount(accelerator, alone=alone)
        for index, case in enumerate(cases):
            outcomes[case] = _train_case(case, accelerator, count, replays=index % world.size == world.rank)
    return outcomes


def _train_case(case: Case, accelerator: Accelerator, count: PolarCount, *, replays: bool) -> Outcome:
    counters, before = accelerator.counters, count.matrices
    with costs(case.own), windlass.initialize(build(case.model), config_of(case), accelerator=accelerator) as engine:
        assert engine.plan.muon is not None
        names = muon_names(engine.module)
        planned = {one.name for one in engine.plan.muon.matrices}
        assert planned == set(names), planned ^ set(names)
        states, norms = [], []
        for step in range(STEPS):
            counters.reset()
            train_step(engine, step, case.accumulation)
            measured = {key: (tally.calls, tally.bytes) for key, tally in counters.collectives.items()}
            reads = counters.host_reads
            norms.append(engine.grad_norm or 0.0)
            states.append(engine.full_state_dict())
        momenta = {name: engine.full_optimizer_state(name)["momentum"] for name in names}
        trace, plan = Trace(states, norms, momenta), engine.plan.muon
        result = partial(
            Outcome,
            digest_of(trace),
            measured,
            engine.plan.prediction.step(case.accumulation, engine.rank),
            accelerator.memory.stats().by_tag,
            dict(engine.plan.prediction.persistent),
            reads,
            count.matrices - before,
            len(plan.waves),
        )
        ranks = engine.num_ranks
    return result(replay(case, trace, ranks, plan, accelerator) if replays else None)


def train_step(engine: windlass.Engine, step: int, accumulation: int = 1) -> None:
    """One optimizer step on the rows of this rank."""
    for micro in range(accumulation):
        x, y = (my_part(t, engine.rank, engine.num_ranks, micro, accumulation) for t in batch_of(step))
        engine.backward(engine(x, y))
        engine.step()


def digest_of(trace: Trace) -> str:
    """Equal for equal bits."""
    digest = hashlib.sha256(repr(trace.norms).encode())
    for state in (*trace.states, trace.momenta):
        for name in sorted(state):
            digest.update(name.encode() + state[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
