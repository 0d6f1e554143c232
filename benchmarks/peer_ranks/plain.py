"""What the others should train: plain PyTorch in fp32, in one process, on the sequences of all ranks."""

from __future__ import annotations

import torch
import workload
from torch import Tensor


def main() -> None:
    """Train."""
    settings = workload.read_settings()
    model = workload.build_model()
    optimizers = workload.build_optimizers(model, settings)
    parameters = list(model.parameters())

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, workload.LARGEST_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    workload.measure(settings, model, Tensor.backward, step)


if __name__ == "__main__":
    main()
