"""Workers for tests/ranks/test_saved_weights.py: what is left of gathered weights between forward and backward."""

from __future__ import annotations

from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import windlass
from windlass.conformance.models import MODELS, Network, batch, build, loss_of
from windlass.conformance.opening import opened
from windlass.conformance.training import config_of, train_engine, windlass_ranks
from windlass.conformance.training_workers import ROWS, part_of
from windlass.core.plan import Placement
from windlass.core.saved_weights import SavedWeights
from windlass.core.state import ModelState

DEEP = 12


def without_hooks() -> AbstractContextManager[Any]:
    """Autograd keeps what it saves, as it does where nobody stands in."""
    return patch.object(SavedWeights, "begin", lambda self: False)


class Watched:
    """Which gathered copies of which unit are still in memory."""

    def __init__(self) -> None:
        self.copies: dict[str, list[tuple[StorageWeakRef, int]]] = defaultdict(list)
        original = ModelState.bind

        def bind(state: ModelState, placement: Placement, whole: Tensor) -> None:
            original(state, placement, whole)
            memory = state.parameters[placement.name].untyped_storage()
            unit = state.plan.placement_by_name[placement.name][0].unit
            self.copies[unit].append((StorageWeakRef(memory), memory.nbytes()))

        self.watching = patch.object(ModelState, "bind", bind)

    def bytes_alive(self) -> dict[str, int]:
        alive = {
            unit: sum(size for memory, size in copies if not memory.expired()) for unit, copies in self.copies.items()
        }
        return {unit: size for unit, size in alive.items() if size}


def alive_after_forward(hooks: bool, model: str = "Deep", more: dict[str, Any] | None = None) -> dict[str, Any]:
    """Units, those that lie in slots, and the bytes of each that are in memory when a forward pass has ended."""
    torch.manual_seed(0)
    module = Network(layers=DEEP) if model == "Deep" else build(model)
    watched = Watched()
    with opened() as accelerator, nullcontext() if hooks else without_hooks(), watched.watching:
        config = config_of(3, 1, windlass_ranks(), ROWS, **(more or {}))
        with windlass.initialize(module, config, accelerator=accelerator) as engine:
            results = []
            for step in range(2):
                loss = loss_of(engine(*part_of(engine, step)))
                assert engine.executor.residency is not None
                results.append(
                    {
                        "units": [unit.name for unit in engine.plan.units],
                        "in_slots": sorted(set(engine.executor.residency._table.holds.values())),
                        "alive": watched.bytes_alive(),
                    }
                )
                engine.backward(loss)
                del loss
                assert engine.step()
            assert not watched.bytes_alive()
            assert results[0] == results[1]
            return results[0]


def states_with_and_without(models: list[str], more: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Per model: weights and norms after some steps with the hooks, and without."""
    results = {}
    for model in models:
        pair = []
        for context in (nullcontext, without_hooks):
            with opened() as accelerator, context():
                torch.manual_seed(0)
                module = OWN_MODELS[model]() if model in OWN_MODELS else build(model)
                config = config_of(3, 2, windlass_ranks(), ROWS, **more)
                with windlass.initialize(module, config, accelerator=accelerator) as engine:
                    norms = train_engine(engine, 2)
                    calls = {key: tally.calls for key, tally in accelerator.counters.collectives.items()}
                    pair.append((engine.full_state_dict(), norms, calls))
        results[model] = (pair[0], pair[1])
    return results


class SavesOnHost(Network):
    """The user's own hooks, around one block and inside of nothing else."""

    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            if index == 1:
                with save_on_cpu():
                    x = block(x)
            else:
                x = block(x)
        return x


class CheckpointsInside(Network):
    """A module with weights of its own checkpoints a child."""

    class _Outer(nn.Module):
        def __init__(self, inner: nn.Module, reentrant: bool) -> None:
            super().__init__()
            self.inner, self.reentrant = inner, reentrant
            self.scale = nn.Parameter(torch.full((16,), 1.1))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x * self.scale, use_reentrant=self.reentrant)  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self._Outer(block, index % 2 == 0) for index, block in enumerate(self.blocks))


OWN_MODELS = {kind.__name__: kind for kind in (SavesOnHost, CheckpointsInside)}


class FrozenInside(Network):
    """What a frozen block computes inside is read by the loss, without the block's output."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].requires_grad_(False)
        self.get_submodule("blocks.2.up").register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, given: Any, output: Tensor) -> None:
        self.feature = output


def gradient_round_a_frozen_blocks_output() -> None:
    """Its call is never announced: the weights are gathered when a node asks for what it saved of them."""
    torch.manual_seed(0)
    plain = FrozenInside()
    torch.manual_seed(0)
    module = FrozenInside()
    with opened() as accelerator:
        config = config_of(3, 1, windlass_ranks(), ROWS)
        with windlass.initialize(module, config, accelerator=accelerator) as engine:
            engine(*part_of(engine, 0))
            module.feature.square().sum().backward()
            got = engine.full_gradient("embedding.weight")
    plain(*batch(0, ROWS))
    (plain.feature.square().sum() / windlass_ranks()).backward()
    want = plain.embedding.weight.grad
    assert want is not None
    assert float((got - want).norm() / want.norm()) < 1e-6


MODELS_TO_COMPARE = [*MODELS, *OWN_MODELS]
