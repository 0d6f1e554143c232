"""Products that torch makes for these kernels, as exact as their schemas say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Products of 16 bits are added in fp32 and those of fp32 are not rounded to fewer bits, whatever the process has
    allowed; what it has is set again afterwards. These are settings of torch on the host: nothing waits."""
    settings = torch.backends.cuda.matmul
    before = [
        (name, getattr(settings, name), getattr(settings, f"{name}_split_k", True))
        for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    ]
    accumulation, precision = settings.allow_fp16_accumulation, settings.fp32_precision
    try:
        for name, _, split in before:
            _set_reduction(name, False, split)
        settings.allow_fp16_accumulation = False
        if precision == "tf32":
            settings.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for name, allowed, split in before:
            _set_reduction(name, allowed, split)
        settings.allow_fp16_accumulation = accumulation
        if precision == "tf32":
            settings.fp32_precision = precision


def _set_reduction(name: str, allowed: bool, split: bool) -> None:
    """Before torch 2.10 there is one flag; later ones have a second, for splitting sums, which stays as it is."""
    value = allowed if split else (allowed, split)
    setattr(torch.backends.cuda.matmul, name, value)
