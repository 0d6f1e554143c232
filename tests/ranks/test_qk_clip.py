"""QK-clip on ranks, against Muon and the rule of Kimi K2 by hand in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import qk_clip_workers as workers
from qk_clip_oracle import find_maxima, train_oracle
from windlass.conformance.rank_pool import run_ranks
from windlass.conformance.training import distance

STAGES = [0, 1, 2, 3]
STEPS = 3


def check_oracle(state: dict[str, Tensor], key: Any) -> None:
    wanted, clipped = train_oracle(STEPS)
    # Something is clipped everywhere and something is not, or this would show nothing.
    assert all(0 < sum(step[index] for step in clipped) < STEPS * workers.HEADS for index in range(3)), clipped
    worst = distance(state, wanted)
    assert max(worst.values()) < 2e-5, (key, worst)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_weights_are_those_of_the_rule_by_hand(ranks: int) -> None:
    for result in run_ranks(workers.train_stages, ranks, STAGES, [1, 2] if ranks == 2 else [2], STEPS, {}):
        for key, one in result.items():
            check_oracle(one["state"], key)
            assert one["measured"] == one["predicted"], key
            assert one["measured"]["all_reduce", "qk clip"] == (1, 4 * 3 * workers.HEADS * (ranks - 1))
            assert one["host_reads"] == 1


@pytest.mark.parametrize("stage", [0, 3])
def test_recomputed_passes_count_once_and_maxima_may_come_from_elsewhere(stage: int) -> None:
    for net in ({"checkpoints": True}, {"attend": workers.attend_by_hand}):
        (result,) = run_ranks(workers.train_stages, 1, [stage], [2], STEPS, net)
        check_oracle(result[stage, 2]["state"], net)


def test_nothing_beyond_the_bound_changes_no_bit_and_capturing_neither() -> None:
    for result in run_ranks(workers.train_three_ways, 2, STAGES):
        for stage, (off, never, on, captured) in result.items():
            assert all(torch.equal(off[name], never[name]) for name in off), stage
            assert not all(torch.equal(off[name], on[name]) for name in off), stage
            assert all(torch.equal(captured[name], on[name]) for name in on), stage


def test_passes_that_lead_to_no_step_do_not_count() -> None:
    for result in run_ranks(workers.train_with_interruptions, 2, STAGES):
        for stage, state in result.items():
            check_oracle(state, stage)


@pytest.mark.parametrize("more", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_each_head_shrinks_to_the_bound_and_no_further(more: dict[str, Any]) -> None:
    model = workers.Net(workers.attend).double()
    x, narrow = workers.inputs(0).double(), bool(more)
    momenta = []
    for stage, one in run_ranks(workers.shrink, 2, STAGES, more)[0].items():
        model.load_state_dict(one["before"])
        before = find_maxima(model, x)
        model.load_state_dict(one["state"])
        for old, new in zip(before, find_maxima(model, x), strict=True):
            wanted = torch.where(old > workers.TAU, workers.TAU, old)
            # Logits of bf16 passes are rounded on their way, sums of products of rounded numbers.
            torch.testing.assert_close(new, wanted, rtol=2e-2 if narrow else 1e-6, atol=1e-2 if narrow else 0)
        assert one["narrow"] == {"torch.bfloat16" if narrow else "torch.float32"}, stage
        momenta.append(one["momentum"])
    assert all(torch.equal(one, momenta[0]) for one in momenta)
    assert float(momenta[0].norm()) > 0


def test_an_attention_that_tells_its_probe_nothing_is_an_error() -> None:
    (told,) = run_ranks(workers.raise_unfed, 1, 2)
    assert "the queries of module 'attentions.1' have gradients" in told
    assert "give 'probe' to windlass.functional.attention" in told


def test_one_program_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_SIM", "seed=5,uniform=true")
    for result in run_ranks(workers.train_stages, 2, STAGES, [2], STEPS, {}, accelerator="sim"):
        for key, one in result.items():
            check_oracle(one["state"], key)
            assert one["measured"] == one["predicted"], key
            assert one["host_reads"] == 0
