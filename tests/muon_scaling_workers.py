"""The worker of benchmarks/muon_scaling.py, where the rank processes of the tests find it."""

from __future__ import annotations

from typing import Any

from gpu_benchmark import module


def train_stages(stages: tuple[int, ...], *shape: Any) -> Any:
    """By stage: counted and planned traffic, and elements that Muon updates."""
    return module("scaling_parts.counting").train_stages(stages, module("scaling_parts.llama").LlamaShape(*shape))
