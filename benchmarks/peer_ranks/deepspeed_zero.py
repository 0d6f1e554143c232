"""DeepSpeed at one ZeRO stage, over gloo: its own bf16 mode, optimizer and defaults.

With Muon it clips updates, not gradients, from stage 1 on; variant `unclipped` clips nothing.
"""

from __future__ import annotations

import deepspeed
import torch.distributed as dist
import workload

from windlass.models import GPT


def rename_head(model: GPT) -> None:
    """DeepSpeed's Muon takes every matrix whose name has neither "embed" nor "lm_head" in it, so the head needs one."""
    head = model._modules.pop("head")
    model.add_module("lm_head", head)
    model.__dict__["head"] = head  # where forward finds it


def main() -> None:
    """Train one rank."""
    settings = workload.read_settings()
    deepspeed.init_distributed("gloo")
    model = workload.build_model()
    config = workload.engine_config(settings) | {"bf16": {"enabled": True}, "steps_per_print": 10**9}
    if settings.optimizer == "muon":
        rename_head(model)
        if settings.stage > 0:  # it refuses Muon otherwise
            config["zero_optimization"] = {"stage": settings.stage, "reduce_scatter": False}
    if settings.variant == "unclipped":
        config["gradient_clipping"] = 0.0
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    workload.measure(settings, engine, engine.backward, engine.step, versions={"deepspeed": str(deepspeed.__version__)})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
