"""What an engine saves beside the plan's own state, and how it continues from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from windlass.core import checkpoint
from windlass.core.encoding import decode, encode
from windlass.optimizer import load_groups, save_groups

if TYPE_CHECKING:
    from windlass.engine import Engine


def save(engine: Engine, directory: Path, tag: str | None, client_state: Mapping[str, Any] | None) -> Path:
    """Write `directory/tag` (default `step<N>`) and point `latest` at it. A collective."""
    tag = tag or f"step{engine.global_steps}"
    scheduler = engine.lr_scheduler
    extra = {
        "engine": {
            "global_steps": engine.global_steps,
            "skipped_steps": engine.skipped_steps,
            "loss_scale": engine.scaler.state_dict(),
            "scheduler": None if scheduler is None else encode(scheduler.state_dict()),
            "groups": save_groups(engine.optimizer),
        },
        "client_state": dict(client_state or {}),
    }
    checkpoint.save_checkpoint(directory, tag, engine.executor.state, extra)
    return directory / tag


def load(engine: Engine, directory: Path, tag: str | None) -> dict[str, Any]:
    """Continue from `directory/tag` (default: what `latest` points at); the caller's own state. A collective."""
    engine.accelerator.collectives.barrier(engine.accelerator.collectives.world)
    engine.zero_grad()
    engine.books.discard()
    manifest = checkpoint.load_checkpoint(directory, tag, engine.executor.state)
    engine.executor.share_written_weights()
    saved = manifest["engine"]
    engine.books.global_steps, engine.books.skipped_steps = saved["global_steps"], saved["skipped_steps"]
    engine.scaler.load_state_dict(saved["loss_scale"])
    alike = _algorithms(saved["groups"]) == _algorithms(engine.optimizer.param_groups)
    if alike:
        load_groups(engine.optimizer, saved["groups"])
    if engine.lr_scheduler is not None and saved["scheduler"] is not None:
        state = decode(saved["scheduler"])
        if not alike:  # of other groups: their rates say nothing about these
            state.pop("base_lrs", None)
        engine.lr_scheduler.load_state_dict(state)
    client_state: dict[str, Any] = manifest["client_state"]
    return client_state


def _algorithms(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """What updates each group; AdamW where nothing is said."""
    return [group.get("algorithm", "adamw") for group in groups]
