"""Kernels and training on the GPU against the host: the same bits where rounding is fixed, close where it is not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import windlass
from windlass.accelerator.counters import Counters
from windlass.accelerator.interface import Accelerator
from windlass.accelerator.kernels import Kernels
from windlass.accelerator.reference import SCHEMAS, reference_kernels
from windlass.backends.cuda.device import CudaAccelerator
from windlass.conformance.kernel_cases import DTYPES, make_scalars, make_state
from windlass.models import build_model

STEPS, ROWS, LENGTH = 20, 4, 64


@pytest.mark.parametrize("gradient", DTYPES)
@pytest.mark.parametrize("decoupled", [True, False])
def test_adamw_has_the_bits_of_the_reference_on_the_host(
    accelerator: CudaAccelerator, gradient: torch.dtype, decoupled: bool
) -> None:
    state, scalars = make_state(100_003, gradient), make_scalars(3)
    wanted, found = state.copy(), state.on(accelerator.device)
    number, keep = torch.tensor(0.25), torch.tensor(True)
    host = Kernels(SCHEMAS, reference_kernels(), Counters())
    wanted.update(host["adamw"], scalars, number, keep, decoupled=decoupled)
    given = [one.to(accelerator.device) for one in (scalars, number, keep)]
    found.update(accelerator.kernels["adamw"], *given, decoupled=decoupled)
    assert found.fetch(accelerator.to_host).bits() == wanted.bits()


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("destination", DTYPES)
def test_scale_cast_has_the_bits_of_the_reference_on_the_host(
    accelerator: CudaAccelerator, source: torch.dtype, destination: torch.dtype
) -> None:
    values = make_state(100_003, source).gradient
    scale = torch.tensor(0.7)
    wanted = (values.to(torch.float32) * scale).to(destination)
    device = torch.empty(100_003, dtype=destination, device=accelerator.device)
    scale_cast = accelerator.kernels["scale_cast"]
    found = scale_cast(device, values.to(accelerator.device), scale.to(accelerator.device))
    assert torch.equal(accelerator.to_host(found).view(torch.uint8), wanted.view(torch.uint8))


def batch() -> tuple[Tensor, Tensor]:
    """The same for every step, so that the loss falls."""
    ids = torch.randint(0, 256, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def start(accelerator: Accelerator, stage: int, **more: object) -> windlass.Engine:
    torch.manual_seed(0)
    config = {
        **more,
        "train_batch_size": ROWS,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
        "zero_optimization": {"stage": stage},
    }
    return windlass.initialize(build_model("nano"), config, accelerator=accelerator)


def train(engine: windlass.Engine, first: int = 0, last: int = STEPS) -> list[float]:
    losses = []
    ids, targets = (one.to(engine.accelerator.device) for one in batch())
    for _ in range(first, last):
        loss = engine(ids, targets)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach().to("cpu")))
    return losses


@pytest.fixture(scope="module")
def host() -> Iterator[Accelerator]:
    with contextlib.closing(windlass.open_accelerator("cpu")) as opened:
        yield opened


@pytest.fixture(scope="module")
def wanted(host: Accelerator) -> list[float]:
    """The losses on the host, at stage 0."""
    with start(host, 0) as engine:
        return train(engine)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training_goes_as_on_the_host(accelerator: CudaAccelerator, wanted: list[float], stage: int) -> None:
    before = accelerator.memory.stats().used
    with start(accelerator, stage) as engine:
        losses = train(engine)
    assert losses == pytest.approx(wanted, abs=1e-4)
    assert losses[-1] < losses[0] - 0.1
    accelerator.streams.synchronize()
    assert accelerator.memory.stats().used == before


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("narrow", [False, True], ids=["fp32 moments", "bf16 moments"])
def test_a_captured_update_trains_to_the_same_bits(accelerator: CudaAccelerator, stage: int, narrow: bool) -> None:
    bf16 = {"enabled": True, "bf16_optimizer_states": narrow}
    with sdpa_kernel(SDPBackend.MATH):  # others add in an order that changes from run to run
        with start(accelerator, stage, bf16=bf16) as engine:
            plain = train(engine)
        with start(accelerator, stage, bf16=bf16, capture_update=True) as engine:
            captured = train(engine)
    assert captured == plain
    assert "capture_failed" not in accelerator.facts


def test_a_checkpoint_goes_from_host_to_device_and_back(
    accelerator: CudaAccelerator, host: Accelerator, wanted: list[float], tmp_path: Path
) -> None:
    places: list[tuple[Accelerator, int, int]] = [(host, 0, 7), (accelerator, 7, 14), (host, 14, STEPS)]
    losses: list[float] = []
    for place, first, last in places:
        with start(place, 2) as engine:
            if first:
                engine.load_checkpoint(tmp_path)
            assert engine.global_steps == first
            losses += train(engine, first, last)
            engine.save_checkpoint(tmp_path)
    assert losses == pytest.approx(wanted, abs=1e-4)
