"""Coefficients of the kernel `polar`, as data: one triple (a, b, c) per step of Newton-Schulz.

A step replaces each singular value s by a s + b s^3 + c s^5. All start from singular values in [0, 1], and none
but "ten" converges to 1: the others stay near it after few steps, which is what an optimizer needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

Coefficients = tuple[tuple[float, float, float], ...]

_JORDAN: Final = (3.4445, -4.7750, 2.0315)

# "The Polar Express", algorithm 1 (Amsel, Persson, Musco & Gower 2025, arXiv 2505.16932), its first five steps.
_POLAR_EXPRESS: Final = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
_SAFETY: Final = 1.01  # of the same algorithm: singular values that rounding lifts above 1 do not run away


def _shrink(coefficients: Coefficients, safety: float) -> Coefficients:
    """The steps of s / safety."""
    return tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in coefficients)


COEFFICIENTS: Final[Mapping[str, Coefficients]] = MappingProxyType(
    {
        # Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
        "jordan": (_JORDAN,) * 5,
        # You 2025, published with the polynomials above as a sequence of five.
        "you": (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        "polar_express": _shrink(_POLAR_EXPRESS, _SAFETY),
        # DeepSeek-V4, technical report, section 3.4.1: eight fast steps, then two that converge.
        "ten": (_JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2,
    }
)
"""Sets by name. The further a set lifts small singular values, the further it lifts rounding errors beside them:
the product of its `a` is the factor, 485 for "jordan", and 79 000 for "ten"."""


_NOISE = 2.0
"""Of the smallest singular values that the Gram form may let grow before it starts anew."""


def plan_restarts(coefficients: Coefficients, rounding: float) -> tuple[int, ...]:
    """Before which steps the Gram form must compute its Gram matrix anew, if its products are `rounding` exact.

    An error in the Gram matrix grows by a^2 a step where the matrix is singular; beyond about 1 it is a singular value.
    """
    restarts = []
    growth = rounding
    for step, (a, _, _) in enumerate(coefficients):
        growth *= a * a
        if step > 0 and growth > _NOISE:
            restarts.append(step)
            growth = rounding * a * a
    return tuple(restarts)
