"""`windlass.initialize`: choose a device, resolve the configuration, build the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from windlass.accelerator.interface import Accelerator
from windlass.accelerator.registry import open_accelerator
from windlass.config import Config, configured_accelerator, load_config
from windlass.engine import Engine


def initialize(
    model: nn.Module,
    config: Mapping[str, Any] | str | Path | Config | None = None,
    *,
    model_parameters: Iterable[nn.Parameter] | Iterable[Mapping[str, Any]] | None = None,
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | None = None,
    lr_scheduler: Any = None,
    accelerator: str | Accelerator | None = None,
) -> Engine:
    """Plan the training of `model` and make it ready to run. Every rank calls this with the same arguments.

    `config` is a dict or the path of a JSON file (DeepSpeed's keys are understood). `model_parameters`: the
    parameters to train, as a list or as groups with settings of their own (default: all). `optimizer`: a torch Adam
    or AdamW whose groups rule, or a function that makes one. `lr_scheduler`: any object with `step()`, or a
    function of the optimizer that makes one. Raises ConfigError or ValueError for bad input, on every rank and
    before anything is sent.
    """
    wanted = accelerator if isinstance(accelerator, str) else None
    if isinstance(accelerator, Accelerator):
        device = accelerator
    else:
        asked = config.accelerator if isinstance(config, Config) else configured_accelerator(config)
        device = open_accelerator(wanted, config_name=asked)
    try:
        ranks = device.collectives.world.size
        resolved = config if isinstance(config, Config) else load_config(config, ranks)
        return Engine(
            model,
            resolved,
            device,
            model_parameters,
            optimizer,
            lr_scheduler,
            owns_accelerator=device is not accelerator,
        )
    except BaseException:
        if device is not accelerator:
            device.close()
        raise
