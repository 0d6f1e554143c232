"""Every kernel in plain tensor operations: the fallback of every backend and the oracle of the suite.

Importing this package imports torch, so `windlass.accelerator` itself does not; a backend does, when it is opened.
"""

from __future__ import annotations

from typing import Final

from windlass.accelerator.kernels import REFERENCE, Kernel, KernelSchema
from windlass.accelerator.reference.adamw import (
    ADAMW,
    ADAMW_BF16_MOMENTS,
    ADAMW_MANY,
    ADAMW_SCALARS,
    adamw,
    adamw_bf16_moments,
    adamw_many,
)
from windlass.accelerator.reference.cross_entropy import LINEAR_CROSS_ENTROPY, linear_cross_entropy
from windlass.accelerator.reference.momentum import (
    MOMENTUM_BLEND,
    SCALE_DECAY_SCALARS,
    SCALE_DECAY_UPDATE,
    momentum_blend,
    scale_decay_update,
)
from windlass.accelerator.reference.norms import (
    LAYER_NORM,
    LAYER_NORM_BACKWARD,
    RMS_NORM,
    RMS_NORM_BACKWARD,
    layer_norm,
    layer_norm_backward,
    rms_norm,
    rms_norm_backward,
)
from windlass.accelerator.reference.polar import POLAR, POLAR_GRAM, polar, polar_gram
from windlass.accelerator.reference.vectors import SCALE_CAST, SQUARE_SUM, scale_cast, square_sum

__all__ = [
    "ADAMW_SCALARS",
    "SCALE_DECAY_SCALARS",
    "SCHEMAS",
    "adamw",
    "adamw_bf16_moments",
    "adamw_many",
    "layer_norm",
    "layer_norm_backward",
    "linear_cross_entropy",
    "momentum_blend",
    "polar",
    "polar_gram",
    "reference_kernels",
    "rms_norm",
    "rms_norm_backward",
    "scale_cast",
    "scale_decay_update",
    "square_sum",
]

_KERNELS: Final = (
    (ADAMW, adamw),
    (ADAMW_BF16_MOMENTS, adamw_bf16_moments),
    (SQUARE_SUM, square_sum),
    (SCALE_CAST, scale_cast),
    (POLAR, polar),
    (POLAR_GRAM, polar_gram),
    (MOMENTUM_BLEND, momentum_blend),
    (SCALE_DECAY_UPDATE, scale_decay_update),
    (RMS_NORM, rms_norm),
    (RMS_NORM_BACKWARD, rms_norm_backward),
    (LAYER_NORM, layer_norm),
    (LAYER_NORM_BACKWARD, layer_norm_backward),
    (LINEAR_CROSS_ENTROPY, linear_cross_entropy),
)

SCHEMAS: Final[tuple[KernelSchema, ...]] = (*(schema for schema, _ in _KERNELS), ADAMW_MANY)


def reference_kernels() -> tuple[Kernel, ...]:
    """All references, lowest priority."""
    alone = (Kernel(schema.name, REFERENCE, function, priority=0) for schema, function in _KERNELS)
    return (*alone, Kernel(ADAMW_MANY.name, REFERENCE, adamw_many, priority=0, composed=True))
