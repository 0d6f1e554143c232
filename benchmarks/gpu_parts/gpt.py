"""The GPT that is trained, what it costs by formula, and what datasheets promise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from windlass.models import ModelShape

if TYPE_CHECKING:
    from gpu_parts.context import Context

# Dense bf16 FLOP/s of datasheets, by what the device's name holds; the first that fits.
_DATASHEETS: Final = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("H200 NVL", 835e12),
    ("H200", 989.4e12),
    ("GH200", 989.4e12),
    ("B200", 2250e12),
    ("A100", 312e12),
)


@dataclass(frozen=True)
class TrainedShape:
    """A GPT of windlass.models and what is computed per token."""

    shape: ModelShape

    @property
    def flops_per_token(self) -> float:
        """6 for each element of a matrix that multiplies (embeddings that are looked up do not), and 6 x layers x width
        x sequence for causal attention: half of what PaLM's formula counts, which takes the masked half too."""
        shape = self.shape
        matrices = 12 * shape.layers * shape.width**2 + shape.vocabulary * shape.width
        return 6.0 * matrices + 6.0 * shape.layers * shape.width * shape.sequence_length

    def stacks(self) -> dict[tuple[int, int], int]:
        """Rows and columns of the matrices that Muon takes, q, k and v apart -> how many of each."""
        width, layers = self.shape.width, self.shape.layers
        return {(width, width): 4 * layers, (4 * width, width): layers, (width, 4 * width): layers}

    def parameter_shapes(self) -> list[tuple[int, ...]]:
        """All parameters of the model, a tied matrix once."""
        width = self.shape.width
        block = [(width,), (width,), (3 * width, width), (width, width), (width,), (width,), (4 * width, width)]
        block.append((width, 4 * width))
        ends: list[tuple[int, ...]] = [(self.shape.vocabulary, width), (self.shape.sequence_length, width), (width,)]
        ends += [(width,), *[(self.shape.vocabulary, width)] * (not self.shape.tied)]
        return [*block * self.shape.layers, *ends]


def model_shape(context: Context) -> TrainedShape:
    """About a billion parameters at full scale: 18 layers of width 2048, heads of 128, GPT-2's words, a tied head."""
    if context.scale == "full":
        return TrainedShape(
            ModelShape("1b", width=2048, layers=18, heads=16, sequence_length=2048, vocabulary=50304, tied=True)
        )
    return TrainedShape(ModelShape("mini", width=64, layers=2, heads=2, sequence_length=32, vocabulary=256, tied=True))


def datasheet_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s that the maker states for a device of this name; None if it is not known here."""
    return next((rate for words, rate in _DATASHEETS if words in name), None)
