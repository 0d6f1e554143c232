"""Training with Muon on the open device, and the oracle: plain PyTorch in one process, on the whole batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import windlass
from windlass.accelerator.interface import Accelerator
from windlass.accelerator.polar import COEFFICIENTS
from windlass.conformance.allocations import bring, bring_number
from windlass.conformance.models import batch, build
from windlass.conformance.opening import opened
from windlass.conformance.training import LR, WEIGHT_DECAY, config_of, train_engine, windlass_ranks
from windlass.conformance.training_workers import ROWS, part_of

MODEL, STEPS, MOMENTUM = "Network", 4, 0.9
JORDAN = (3.4445, -4.7750, 2.0315)

Result = dict[str, Any]


# -- on every rank ----------------------------------------------------------------------------------------------------


def train_stages(stages: list[int]) -> dict[int, Result]:
    """Train at each stage, then meet a bad gradient. Of each: weights, momenta and norms, what the bad step changed,
    and what was left in memory."""
    results = {}
    with opened() as accelerator:
        alike = _batches_alike(accelerator)
        for stage in stages:
            with windlass.initialize(build(MODEL), _configure(stage), accelerator=accelerator) as engine:
                norms = train_engine(engine, STEPS)
                before = _everything(engine)
                result = {"norms": norms, "alike": alike, **before, "moved": _skip(engine, before)}
            result["left"] = accelerator.memory.stats().used.value
            results[stage] = result
    return results


def _configure(stage: int) -> dict[str, Any]:
    """Without clipping: a norm is a sum in the order of the layout, which is not the same at every stage."""
    params = {"lr": LR, "weight_decay": WEIGHT_DECAY, "momentum": MOMENTUM}
    more = {"optimizer": {"type": "Muon", "params": params}, "muon": {"ns_dtype": "fp32"}, "gradient_clipping": 0.0}
    return config_of(stage, 1, windlass_ranks(), ROWS, **more)


def _everything(engine: windlass.Engine) -> Result:
    """Weights, and the momentum of every matrix of a block."""
    names = matrices_of(engine.module)
    momenta = {name: engine.full_optimizer_state(name)["momentum"] for name in names}
    return {"weights": engine.full_state_dict(), "momenta": momenta}


def _skip(engine: windlass.Engine, before: Result) -> list[str]:
    """What a step changes whose gradient is not finite on the last rank."""
    bad = float("inf") if engine.rank == engine.num_ranks - 1 else 1.0
    engine.backward(engine(*part_of(engine, STEPS)) * bring_number(engine.accelerator, bad))
    assert not engine.step()
    after = _everything(engine)
    return [name for kind in before for name, one in before[kind].items() if not torch.equal(one, after[kind][name])]


def _batches_alike(accelerator: Accelerator) -> bool:
    """Whether a matrix has the same bits of `polar` and `polar_gram` in every stack, for the shapes of the model."""
    random = torch.Generator().manual_seed(3)
    for name in ("polar", "polar_gram"):
        kernel = accelerator.kernels[name]
        for shape in ((32, 16), (16, 32)):
            stack = torch.randn(8, *shape, generator=random)
            whole = accelerator.to_host(kernel(bring(accelerator, stack), COEFFICIENTS["jordan"]))
            for first, count in ((0, 1), (1, 2), (3, 4), (7, 1)):
                part = bring(accelerator, stack[first : first + count].clone())
                found = accelerator.to_host(kernel(part, COEFFICIENTS["jordan"]))
                if not torch.equal(found, whole[first : first + count]):
                    return False
    return True


# -- the oracle -------------------------------------------------------------------------------------------------------


def matrices_of(module: nn.Module) -> list[str]:
    """Parameters that Muon is for: the matrices of a block."""
    return [name for name, one in module.named_parameters() if name.startswith("blocks.") and one.dim() == 2]


def train_plainly(dtype: torch.dtype) -> Result:
    """In this dtype throughout: weights, momenta and norms."""
    module = build(MODEL).to(dtype)
    names = matrices_of(module)
    parameters = dict(module.named_parameters())
    others = [one for name, one in parameters.items() if name not in names]
    adam = torch.optim.AdamW(others, lr=LR, weight_decay=WEIGHT_DECAY)
    momenta = {name: torch.zeros_like(parameters[name]) for name in names}
    norms = []
    for step in range(STEPS):
        module(*batch(step, ROWS)).backward()
        gradients = [one.grad for one in parameters.values() if one.grad is not None]
        norms.append(float(torch.cat([one.flatten() for one in gradients]).norm()))
        adam.step()
        with torch.no_grad():
            for name in names:
                _update_plainly(parameters[name], momenta[name])
        module.zero_grad()
    weights = {name: one.detach() for name, one in module.state_dict().items()}
    return {"weights": weights, "momenta": momenta, "norms": norms}


def _update_plainly(weight: Tensor, momentum: Tensor) -> None:
    """Jordan et al. 2024 with Nesterov's blend, scaled as by Liu et al. 2025."""
    assert weight.grad is not None
    momentum.mul_(MOMENTUM).add_((1 - MOMENTUM) * weight.grad)
    blend = (1 - MOMENTUM) * weight.grad + MOMENTUM * momentum
    x = blend.T if blend.shape[0] > blend.shape[1] else blend
    x = x / x.norm()
    a, b, c = JORDAN
    for _ in range(5):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    direction = x.T if blend.shape[0] > blend.shape[1] else x
    weight.mul_(1 - LR * WEIGHT_DECAY).sub_(LR * 0.2 * max(weight.shape) ** 0.5 * direction)
