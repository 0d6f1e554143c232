"""PyTorch's fully_shard (FSDP2), one group per block and one for the rest: bf16 weights, gradients reduced in fp32.

Variant `reshard` frees gathered weights after the forward pass (ZeRO-3), `noreshard` keeps them until the backward
pass has used them (nearer to ZeRO-2).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import workload
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def main() -> None:
    """Train one rank."""
    settings = workload.read_settings()
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (settings.num_ranks,))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = workload.build_model()
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=settings.variant == "reshard")
    optimizers = workload.build_optimizers(model, settings)
    parameters = list(model.parameters())

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, workload.LARGEST_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    workload.measure(settings, model, Tensor.backward, step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
