"""Coefficients of the kernels `polar` and `polar_gram`, as data: one triple (a, b, c) per step of Newton-Schulz; and
what either form costs.

A step replaces each singular value s by a s + b s^3 + c s^5. All start from singular values in [0, 1], and none
but "ten" converges to 1: the others stay near it after few steps, which is what an optimizer needs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Final, Literal

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


_NOISE: Final = 2.0
"""Size to which the largest rounding error of a Gram matrix may grow, as if it lay in one singular direction, before
the Gram form starts anew. Spread evenly, as they are but for matrices of a few rows, the errors are smaller by the root
of half the rows. With one restart for five steps, fp16 is then as exact as the standard form; without, "you",
"polar_express" and "ten" are not."""


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


def standard_flops(rows: int, columns: int, steps: int, *, symmetric: bool = False) -> int:
    """Floating-point operations of the standard form: X X^T, its square, and their sum times X, once a step.

    `symmetric` counts half of a product whose result is known to be symmetric. Smaller terms are left out.
    """
    small, large = sorted((rows, columns))
    half = 1 if symmetric else 2
    return steps * (half * small**2 * large + half * small**3 + 2 * small**2 * large)


def gram_flops(
    rows: int, columns: int, coefficients: Coefficients, restarts: tuple[int, ...], symmetric: bool = False
) -> int:
    """Floating-point operations of the Gram form with these restarts, counted as in `standard_flops`.

    A stretch between restarts makes one Gram matrix and multiplies X once. In it each step squares the Gram matrix; all
    but the first multiply the product so far, and all but the last take the Gram matrix along, which is two products.
    """
    small, large = sorted((rows, columns))
    half = 1 if symmetric else 2
    steps = len(coefficients)
    stretches = len({step for step in restarts if 0 < step < steps}) + 1 if steps else 0
    products = steps + (steps - stretches) + 2 * (steps - stretches)
    return stretches * (half + 2) * small**2 * large + products * half * small**3


Form = Literal["standard", "gram"]


def choose_form(
    rows: int, columns: int, coefficients: Coefficients, *, symmetric: bool, product_dtypes: Collection[str]
) -> Form:
    """The form of fewer operations for matrices of this shape: the Gram form for long ones, where it is safe.

    `product_dtypes` names the dtypes in which the device multiplies at full speed, as `Capabilities.matmul_dtypes`
    does. The Gram form is not safe in bfloat16, and in float32 too slow beside the standard form in bfloat16.
    """
    if "float16" in product_dtypes:
        rounding = 2.0**-10
    elif "bfloat16" in product_dtypes:
        return "standard"
    else:
        rounding = 2.0**-23
    gram = gram_flops(rows, columns, coefficients, plan_restarts(coefficients, rounding), symmetric)
    return "gram" if gram < standard_flops(rows, columns, len(coefficients), symmetric=symmetric) else "standard"
