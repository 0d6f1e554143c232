"""Workers for tests/ranks/test_captured_update.py: training whose update is replayed has the bits of the plain one.

The recorder does what a graph of a GPU does: the first call of a function with some tensors is run and its operations
are noted, and later calls run those operations on the same memory, without the function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import windlass
from windlass.accelerator.interface import Accelerator, TensorFunction
from windlass.conformance.models import build
from windlass.conformance.opening import opened
from windlass.conformance.training import LR, config_of, windlass_ranks
from windlass.conformance.training_workers import everything, part_of, same_bits

STEPS = 7
OVERFLOW = 3  # the step whose gradients are not finite


class Operations(TorchDispatchMode):
    """Notes every operation of torch. Tensors that are neither `given` nor made on the way are an error."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {id(tensor): tensor for tensor in given}
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for one in _pytree.tree_leaves((args, kwargs)):
            assert not isinstance(one, Tensor) or id(one) in self._known, f"{operation} uses a tensor from elsewhere"
        results = operation(*args, **(kwargs or {}))
        made = [one for one in _pytree.tree_leaves(results) if isinstance(one, Tensor)]
        assert made, f"{operation} gives the host a value"
        self._known.update({id(one): one for one in made})
        self.operations.append((operation, args, kwargs or {}, results))
        return results


@dataclass
class Recording:
    """What one call did, and the tensors that it read and wrote, which stay alive with it."""

    given: list[Tensor]
    operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]
    results: list[Tensor]

    def replay(self) -> list[Tensor]:
        """The same operations on the same memory; what they make on the way is new."""
        now: dict[int, Any] = {}

        def current(value: Any) -> Any:
            return now.get(id(value), value) if isinstance(value, Tensor) else value

        for operation, args, kwargs, results in self.operations:
            again = operation(*_pytree.tree_map(current, args), **_pytree.tree_map(current, kwargs))
            for before, after in zip(_pytree.tree_leaves(results), _pytree.tree_leaves(again), strict=True):
                now[id(before)] = after
        return [current(one) for one in self.results]


@dataclass
class Recorder:
    """An `Accelerator.capture`."""

    recorded: int = 0
    replayed: int = 0
    functions: int = 0
    _of_calls: dict[tuple[Any, ...], Recording] = field(default_factory=dict)

    def capture(self, function: TensorFunction) -> TensorFunction:
        self.functions += 1
        number = self.functions

        def call(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            places = ((one.data_ptr(), one.shape, one.stride(), one.dtype) for one in tensors)
            key = (number, *places)
            known = self._of_calls.get(key)
            if known is not None:
                self.replayed += 1
                return known.replay()
            self.recorded += 1
            given = list(tensors)
            with Operations(given) as noted:
                results = list(function(given))
            self._of_calls[key] = Recording(given, noted.operations, results)
            return results

        return call


def watch(accelerator: Accelerator) -> Recorder:
    """Let this accelerator record, and compute with operations that the recorder sees."""
    recorder = Recorder()
    accelerator.capture = recorder.capture  # type: ignore[method-assign]
    for name in accelerator.kernels.schemas:
        accelerator.kernels.choose(name, "reference")
    return recorder


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups, one of which decays its gradients and has a rate of its own."""
    matrices = [one for one in module.parameters() if one.dim() > 1]
    vectors = [one for one in module.parameters() if one.dim() <= 1]
    return [{"params": matrices}, {"params": vectors, "decoupled": False, "lr": 0.3 * LR, "weight_decay": 0.2}]


def train(captures: bool, stage: int, accumulation: int, more: dict[str, Any], model: str) -> dict[str, Any]:
    """Train with a schedule, clipping, groups and a step that overflows; everything that came of it."""
    schedule = {"type": "WarmupLR", "params": {"warmup_max_lr": LR, "warmup_num_steps": 5}}
    config = config_of(stage, accumulation, windlass_ranks(), capture_update=captures, scheduler=schedule, **more)
    with opened() as accelerator:
        recorder = watch(accelerator)
        module = build(model)
        norms = []
        with windlass.initialize(module, config, model_parameters=groups_of(module), accelerator=accelerator) as engine:
            for step in range(STEPS):
                for _ in range(accumulation):
                    loss = engine(*part_of(engine, step))
                    engine.backward(loss * float("inf") if step == OVERFLOW else loss)
                    updated = engine.step()
                assert updated == (step != OVERFLOW)
                norms.append(engine.grad_norm)
            assert accelerator.memory.stats().by_tag == dict(engine.plan.prediction.persistent)
            state = everything(engine)
        assert accelerator.memory.stats().used.value == 0
    return {"state": state, "norms": norms[:OVERFLOW] + norms[OVERFLOW + 1 :], "recorder": recorder}


def replayed_training_equals_plain(stage: int, accumulation: int, more: dict[str, Any], model: str) -> None:
    """The same bits, from one recording of each function where all steps are alike."""
    plain, captured = (train(captures, stage, accumulation, more, model) for captures in (False, True))
    assert plain["recorder"].functions == 0
    assert plain["norms"] == captured["norms"]
    assert same_bits(plain["state"], captured["state"])
    recorder: Recorder = captured["recorder"]
    if model == "Network":
        of_muon = recorder.functions - 2  # which has nothing to do in a step that overflows
        assert (of_muon > 2) == ("optimizer" in more)
        assert recorder.recorded == recorder.functions
        assert recorder.replayed == 2 * (STEPS - 1) + of_muon * (STEPS - 2)
    else:
        assert recorder.functions > 2
        assert recorder.replayed > 0
