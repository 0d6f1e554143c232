"""State survives JSON: tuples, keys of any plain type, nesting."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from windlass.core.encoding import decode, encode


def test_values_survive_json() -> None:
    state = {"milestones": Counter({2: 1, 5: 2}), "betas": (0.9, 0.95), "nested": [{"a": (1, [2])}, None, True, "x"]}
    assert decode(json.loads(json.dumps(encode(state)))) == state


def test_what_no_manifest_can_hold_is_named() -> None:
    with pytest.raises(TypeError, match="a Tensor cannot be saved in a manifest"):
        encode({"x": torch.zeros(1)})
