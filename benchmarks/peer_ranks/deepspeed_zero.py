"""DeepSpeed at one ZeRO stage, over gloo: its own bf16 mode, optimizer and defaults."""

from __future__ import annotations

import deepspeed
import torch.distributed as dist
import workload


def main() -> None:
    """Train one rank."""
    settings = workload.read_settings()
    deepspeed.init_distributed("gloo")
    model = workload.build_model()
    config = workload.engine_config(settings.stage) | {"bf16": {"enabled": True}, "steps_per_print": 10**9}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    workload.measure(settings, engine, engine.backward, engine.step, versions={"deepspeed": str(deepspeed.__version__)})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
