"""Gradients that add up on a rank come to the same bits in a buffer of the region and each by itself."""

from __future__ import annotations

import pytest
import torch

from windlass.backends.cpu.device import open_cpu
from windlass.core.local_gradients import KeptGradients, SeparateGradients
from windlass.core.mesh import data_parallel_mesh
from windlass.core.plan import Plan
from windlass.core.planner import PlanSettings, make_plan
from windlass.core.specs import describe_model


def plan_of(dtype: torch.dtype, accumulation: int, gradient_dtype: str | None) -> Plan:
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)).to(dtype)
    groups = {id(parameter): 0 for parameter in model.parameters()}
    settings = PlanSettings(gradient_accumulation_steps=accumulation, gradient_dtype=gradient_dtype)
    return make_plan(*describe_model(model, groups), data_parallel_mesh(1), settings)


@pytest.mark.parametrize("scale", [1.0, 0.125, 0.3])
@pytest.mark.parametrize("landings", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "accumulation", "gradient_dtype"),
    [
        (torch.float32, 1, None),
        (torch.float32, 4, None),
        (torch.bfloat16, 1, None),
        (torch.bfloat16, 4, None),
        (torch.bfloat16, 4, "bfloat16"),
        (torch.float32, 4, "bfloat16"),
    ],
)
def test_both_ways_come_to_the_same_bits(
    dtype: torch.dtype, accumulation: int, gradient_dtype: str | None, landings: int, scale: float
) -> None:
    plan = plan_of(dtype, accumulation, gradient_dtype)
    accelerator = open_cpu()
    random = torch.Generator().manual_seed(1)
    both = [kind(plan, accelerator, accelerator.collectives.world) for kind in (KeptGradients, SeparateGradients)]
    names = list(plan.parameter_index)[:-1]  # one has no gradient
    for landing in range(landings):
        for name in names:
            gradient = torch.randn(plan.placement_by_name[name][1].shape, generator=random).to(dtype)
            for local in both:
                local.land(name, gradient, scale, new=landing == 0)
    for region in plan.regions:
        kept, separate = (local.take(region, set(names)) for local in both)
        assert torch.equal(kept, separate)
        assert bool(kept.any())
    for local in both:
        local.close()
    assert accelerator.memory.stats().used.value == 0
    accelerator.close()
