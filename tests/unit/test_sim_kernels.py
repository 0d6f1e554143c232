"""Kernels of the simulated accelerator: the results of plain arithmetic, new; and what was consumed is gone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from windlass.accelerator.kernels import Kernel
from windlass.accelerator.polar import COEFFICIENTS
from windlass.accelerator.reference import reference_kernels
from windlass.backends.sim.device import SimAccelerator, open_sim
from windlass.backends.sim.errors import OrderViolation
from windlass.backends.sim.machines import load_machine
from windlass.backends.sim.settings import SimSettings

SIZE = 1000
REFERENCES = {kernel.name: kernel.function for kernel in reference_kernels() if not kernel.composed}


@pytest.fixture
def accelerator() -> Iterator[SimAccelerator]:
    opened = open_sim(0, SimSettings(delay_ms=20, seed=1))
    yield opened
    opened.close()


def draw(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments_of(name: str, low: bool = True) -> dict[str, Any]:
    """Arguments of a kernel by name, in the order of its signature."""
    scale = torch.tensor(0.5)
    if name == "square_sum":
        return {"values": draw(torch.bfloat16), "scale": scale}
    if name == "scale_cast":
        return {"destination": torch.zeros(SIZE, dtype=torch.bfloat16), "source": draw(), "scale": scale}
    if name in ("polar", "polar_gram"):
        return {"stack": draw().view(10, 5, 20), "coefficients": COEFFICIENTS["jordan"]}
    if name in ("rms_norm", "layer_norm", "rms_norm_backward", "layer_norm_backward"):
        return arguments_of_norm(name, low)
    if name == "linear_cross_entropy":
        targets = torch.arange(50) % 20
        return {"hidden": draw().view(50, 20), "weight": draw(seed=1).view(50, 20), "targets": targets, "chunk": 16}
    keep, narrow = torch.tensor(True), torch.zeros(SIZE, dtype=torch.bfloat16) if low else None
    if name == "scale_decay_update":
        scalars = torch.tensor([1e-2, 0.1, 0.2])
        return {"weight": draw(), "direction": draw(seed=1), "scalars": scalars, "keep": keep, "low": narrow}
    noise = torch.tensor([3, 5])
    if name == "momentum_blend":
        return {
            "momentum": draw(torch.bfloat16 if low else torch.float32),
            "gradient": draw(torch.bfloat16, 1),
            "blended": torch.zeros(SIZE, dtype=torch.bfloat16),
            "scalars": torch.tensor([0.95, 0.05]),
            "gradient_scale": scale,
            "keep": keep,
            "noise": noise if low else None,
        }
    moments = torch.bfloat16 if name == "adamw_bf16_moments" else torch.float32
    return {
        "weight": draw(),
        "gradient": draw(torch.bfloat16, 1),
        "exp_avg": draw(moments, seed=2),
        "exp_avg_sq": draw(seed=3).square().to(moments),
        "scalars": torch.tensor([1e-2, 0.9, 0.1, 0.999, 0.001, 1e-8, 0.05, 0.1, 0.001]),
        "gradient_scale": scale,
        "keep": keep,
        "low": narrow,
        **({"noise": noise} if name == "adamw_bf16_moments" else {}),
    }


def arguments_of_norm(name: str, affine: bool) -> dict[str, Any]:
    """Arguments of a norm or of its backward pass, with weight and bias or without."""
    weight = draw(seed=1)[:20].clone() if affine else None
    statistics = (
        {"rstd": torch.ones(50)} if name.startswith("rms") else {"mean": torch.zeros(50), "rstd": torch.ones(50)}
    )
    if name.endswith("backward"):
        bias = {"bias": affine} if name.startswith("layer") else {}
        given = {"output_gradient": draw(seed=2).view(50, 20), "input": draw().view(50, 20), "weight": weight}
        return {**given, **statistics, **bias}
    bias_vector = {"bias": weight} if name == "layer_norm" else {}
    return {"input": draw().view(50, 20), "weight": weight, **bias_vector, "eps": 1e-5}


def as_list(results: Any) -> list[Tensor]:
    return [one for one in (results if isinstance(results, tuple) else (results,)) if one is not None]


@pytest.mark.parametrize("name", sorted(REFERENCES))
@pytest.mark.parametrize("low", [True, False])
def test_results_equal_the_reference_and_are_new(accelerator: SimAccelerator, name: str, low: bool) -> None:
    wanted = as_list(REFERENCES[name](**arguments_of(name, low)))
    given = arguments_of(name, low)
    kept = {key: one.clone() for key, one in given.items() if isinstance(one, Tensor)}
    results = as_list(accelerator.kernels[name](**given))
    storages = {one.untyped_storage().data_ptr() for one in given.values() if isinstance(one, Tensor)}
    assert len(results) == len(wanted)
    for result, one in zip(results, wanted, strict=True):
        assert torch.equal(result, one)
        assert result.untyped_storage().data_ptr() not in storages
    for key, before in kept.items():
        if key not in accelerator.kernels.schemas[name].consumes:
            assert torch.equal(given[key], before), key
    assert accelerator.counters.kernels[name, "reference"].calls == 1


@pytest.mark.parametrize("name", ["adamw", "scale_cast"])
def test_consumed_tensor_may_not_be_read_until_it_is_rewritten(accelerator: SimAccelerator, name: str) -> None:
    given = arguments_of(name)
    results = as_list(accelerator.kernels[name](**given))
    consumed = [given[key] for key in accelerator.kernels.schemas[name].consumes]
    for tensor, result in zip(consumed, results, strict=True):
        with pytest.raises(OrderViolation, match=rf"which kernel '{name}' has consumed"):
            tensor.sum()
        half = SIZE // 2
        tensor[:half].copy_(result[:half])
        assert torch.equal(tensor[:half], result[:half])
        with pytest.raises(OrderViolation, match=rf"which kernel '{name}' has consumed; use what it returned"):
            tensor.sum()
        tensor[half:].copy_(result[half:])
        assert torch.equal(tensor, result)


def test_consumed_slice_leaves_its_neighbours(accelerator: SimAccelerator) -> None:
    region = accelerator.memory.empty((3 * SIZE,), torch.float32, tag="weights").zero_()
    accelerator.kernels["scale_cast"](region[SIZE : 2 * SIZE], draw(), torch.tensor(1.0))
    assert region[:SIZE].sum() == 0
    assert region[2 * SIZE :].sum() == 0
    with pytest.raises(OrderViolation, match=r"reads bytes \d+ to \d+ of allocation 'weights'"):
        region.sum()


def test_consumed_tensor_holds_no_numbers(accelerator: SimAccelerator) -> None:
    region = torch.zeros(SIZE)
    alias = region.numpy()
    accelerator.kernels["scale_cast"](region, draw(), torch.tensor(1.0))
    assert alias.tobytes() == b"\xff" * (4 * SIZE)


def test_argument_that_is_still_written_is_a_violation(accelerator: SimAccelerator) -> None:
    source, target = draw(), accelerator.memory.empty((SIZE,), torch.float32, tag="fetched")
    work = accelerator.memory.copy(target, source, tag="fetch")
    with pytest.raises(OrderViolation, match=r"kernel 'square_sum' .*copy 'fetch'.*wait"):
        accelerator.kernels["square_sum"](target, torch.tensor(1.0))
    work.wait()
    result = accelerator.kernels["square_sum"](target, torch.tensor(1.0))
    assert torch.equal(result, REFERENCES["square_sum"](draw(), torch.tensor(1.0)))


def test_time_is_that_of_the_bytes(accelerator: SimAccelerator) -> None:
    given = arguments_of("scale_cast")
    begun = accelerator.clock()
    accelerator.kernels["scale_cast"](**given)
    machine = load_machine("laptop")
    moved = SIZE * (2 * 2 + 4) + 4  # the destination read and written in bf16, the source in fp32, the scale
    wanted = machine.launch_latency_s + moved / machine.device_bandwidth_bytes_per_s
    assert accelerator.clock() - begun == pytest.approx(wanted, rel=1e-6)


def test_implementation_of_another_package_is_held_to_the_contract(accelerator: SimAccelerator) -> None:
    """One that scribbles on what it does not own, and gives back what it was given."""

    def scribble(destination: Tensor, source: Tensor, scale: Tensor) -> Tensor:
        destination.copy_(source * scale)
        source.zero_()
        return destination

    accelerator.kernels.register(Kernel("scale_cast", "scribbler", scribble))
    given = arguments_of("scale_cast")
    result = accelerator.kernels["scale_cast"](**given)
    assert accelerator.kernels.chosen()["scale_cast"] == "scribbler"
    assert torch.equal(result, draw().mul(0.5).to(torch.bfloat16))
    source = given["source"]
    assert source is not None
    assert torch.equal(source, draw())
    destination = given["destination"]
    assert destination is not None
    with pytest.raises(OrderViolation, match="kernel 'scale_cast' has consumed"):
        destination.sum()
    with pytest.raises(ValueError, match="no kernel schema is named 'muon'"):
        accelerator.kernels.register(Kernel("muon", "scribbler", scribble))
