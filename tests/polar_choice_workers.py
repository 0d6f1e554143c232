"""What ranks do in tests of how orthogonalisation is chosen."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from windlass.accelerator.kernels import Kernel
from windlass.backends.cpu.device import open_cpu
from windlass.config import load_config
from windlass.core.specs import ParamSpec, Role
from windlass.polar_cache import FILE
from windlass.polar_choice import PolarChooser


def choose_forms(folder: str, slow: list[str]) -> tuple[dict[str, str], bool]:
    """What this rank is told, and whether it has written: on rank r the kernel `slow[r]` is slow."""
    accelerator = open_cpu()
    try:
        rank, size = accelerator.collectives.world.rank, accelerator.collectives.world.size
        for name in ("polar", "polar_gram"):
            accelerator.kernels.register(Kernel(name, "scripted", _make(0.01 * (name == slow[rank])), priority=1000))
        own = Path(folder) / str(rank)
        config = load_config({"optimizer": {"type": "Muon"}, "muon": {"ns_dtype": "fp32"}}, size)
        spec = ParamSpec("weight", (512, 1024), "float32", Role.MATRIX, "", algorithm="muon")
        forms: Mapping[str, str] = (
            PolarChooser(accelerator, accelerator.collectives.world, own).choose(config, [spec]).forms
        )
        return dict(forms), (own / FILE).exists()
    finally:
        accelerator.close()


def _make(seconds: float) -> Any:
    def run(stack: Tensor, *_: Any, **__: Any) -> Tensor:
        time.sleep(seconds)
        return stack

    return run
