"""PyTorch's DistributedDataParallel: autocast over fp32 weights, gradients averaged over gloo."""

from __future__ import annotations

import torch
import torch.distributed as dist
import workload
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    """Train one rank."""
    settings = workload.read_settings()
    dist.init_process_group("gloo")
    model = workload.build_model()
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizers = workload.build_optimizers(model, settings)
    parameters = list(model.parameters())

    def forward(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = replica(ids, targets)
        return loss

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, workload.LARGEST_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # the gradients are views of the buckets

    workload.measure(settings, forward, Tensor.backward, step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
