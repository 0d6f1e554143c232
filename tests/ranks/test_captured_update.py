"""An update that is recorded once and replayed trains to the bits of one that is issued anew in every step."""

from __future__ import annotations

from typing import Any

import pytest

from captured_training import replayed_training_equals_plain
from windlass.conformance.rank_pool import run_ranks

STAGES = [0, 1, 2, 3]
MUON = {"optimizer": {"type": "Muon", "params": {"lr": 1e-2}}}
KINDS: dict[str, tuple[int, dict[str, Any], str]] = {
    "fp32": (1, {"gradient_clipping": 0.5}, "Network"),
    "accumulating": (2, {"gradient_clipping": 0}, "Network"),
    "bf16": (1, {"bf16": {"enabled": True}}, "Network"),
    "moments of 16 bits": (1, {"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "Network"),
    "fp16": (1, {"fp16": {"enabled": True, "loss_scale": 64}}, "Network"),
    "other parts in every step": (1, {}, "Branching"),
    "Muon": (1, {**MUON, "muon": {"ns_dtype": "fp32"}}, "Network"),
    "Muon in 16 bits": (1, {**MUON, "bf16": {"enabled": True}, "muon": {"momentum_dtype": "bf16"}}, "Network"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_replayed_training_equals_plain(stage: int, kind: str) -> None:
    run_ranks(replayed_training_equals_plain, 1, stage, *KINDS[kind])


@pytest.mark.parametrize("kind", ["fp32", "bf16", "accumulating", "Muon"])
@pytest.mark.parametrize("stage", STAGES)
def test_replayed_training_equals_plain_on_two_ranks(stage: int, kind: str) -> None:
    run_ranks(replayed_training_equals_plain, 2, stage, *KINDS[kind])
