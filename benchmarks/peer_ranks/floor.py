"""The floor: the same training on every rank by itself, with no communication at all.

The ranks share the machine's memory and caches as those of the other systems do, so what another system takes above
this is the price of keeping its ranks together, or the gain of a faster optimizer step.
"""

from __future__ import annotations

import torch
import workload
from torch import Tensor


def main() -> None:
    """Train this rank's own copy."""
    settings = workload.read_settings()
    model = workload.build_model()
    optimizers = workload.build_optimizers(model, settings)
    parameters = list(model.parameters())

    def forward(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = model(ids, targets)
        return loss

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, workload.LARGEST_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # keeps the memory: new pages cost more than zeros

    workload.measure(settings, forward, Tensor.backward, step)


if __name__ == "__main__":
    main()
