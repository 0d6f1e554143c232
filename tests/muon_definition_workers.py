"""Workers for tests/ranks/test_muon_definition.py: one matrix in one process. Each returns what it found wrong."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import torch
from torch import Tensor

from muon_oracle import draw_matrix, update_exactly
from windlass.accelerator.interface import Accelerator
from windlass.accelerator.polar import COEFFICIENTS, Form
from windlass.conformance.opening import opened
from windlass.core.muon import MuonRules, MuonSettings, Scale, update_matrix

SHAPES = [(16, 16), (24, 7), (3, 40)]
SPECTRA = ["gauss", "k^-1", "k^-2", "deficient"]
SETTINGS = MuonSettings(lr=0.5, momentum=0.9, weight_decay=0.2)
ROUNDING = 2.0**-23
GRAM_BOUND = 5e-3  # of a direction, by norm: the noise of its Gram matrices, see the kernel's schema
BF16_BOUND = 0.05  # of a step, by norm
KINDS: list[tuple[str, Form, float]] = [  # dtype of products and directions, form, bound
    ("float32", "standard", 1e-4),
    ("float32", "gram", 1e-4),
    ("bfloat16", "standard", BF16_BOUND),
]
ADJUSTMENTS: list[tuple[Scale, str]] = [("original", "original"), ("rms", "match_rms_adamw")]  # ours, and torch's name


def formula_of(rows: int, columns: int, scale: Scale) -> float:
    """Each scale as published, written another way than the core has it."""
    if scale == "rms":
        return float(torch.tensor(max(rows, columns) * 0.04, dtype=torch.float64).sqrt())
    ratio = torch.tensor(rows / columns, dtype=torch.float64).sqrt()
    return float(ratio.clamp(min=1) if scale == "original" else ratio)


def bound_of(rules: MuonRules, form: Form) -> float:
    """Of a direction, by norm: as far as Newton-Schulz lifts an error beside a singular value of zero."""
    return max(4 * ROUNDING * math.prod(a for a, _, _ in rules.coefficients), GRAM_BOUND if form == "gram" else 0.0)


def start(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(weight, momentum) from which a step starts."""
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randn(2, *shape, generator=generator)
    return drawn[0].clone(), torch.zeros(shape)


def compare_with_formula() -> list[str]:
    """Two steps, so that the second one starts from a momentum."""
    problems = []
    with opened() as accelerator:
        for shape, spectrum, name, form, scale, nesterov in itertools.product(
            SHAPES, SPECTRA, COEFFICIENTS, get_args(Form), get_args(Scale), (True, False)
        ):
            rules = MuonRules(coefficients=COEFFICIENTS[name], scale=scale, nesterov=nesterov)
            weight, momentum = start(shape)
            for step in range(2):
                gradient = draw_matrix(*shape, spectrum) * (1 + step)
                wanted, wanted_momentum, direction = update_exactly(
                    weight, momentum, gradient, SETTINGS, rules.coefficients, formula_of(*shape, scale), nesterov
                )
                update_matrix(weight, momentum, gradient, None, SETTINGS, rules, accelerator, form=form)
                step_size = SETTINGS.lr * formula_of(*shape, scale)
                error = float((weight.double() - wanted).norm()) / step_size
                if not error <= bound_of(rules, form) * (1 + float(direction.norm())):
                    problems.append(f"{shape} {spectrum} {name} {form} {scale} {nesterov} {step}: {error:.1e}")
                if not torch.allclose(momentum.double(), wanted_momentum, rtol=1e-6, atol=1e-7):
                    problems.append(f"{shape} {spectrum} {name}: momentum {step}")
    return problems


def compare_with_torch() -> list[str]:
    """torch.optim.Muon rounds the blend to bf16 before its norm, keeps X in bf16, and adds 1e-7 to no norm of ours."""
    problems = []
    with opened() as accelerator:
        for shape, (name, adjust), nesterov in itertools.product(
            [(32, 32), (48, 16), (16, 40)], ADJUSTMENTS, (True, False)
        ):
            weight, momentum = start(shape)
            theirs = torch.nn.Parameter(weight.clone())
            options: dict[str, Any] = {"adjust_lr_fn": adjust, "nesterov": nesterov, "ns_steps": 5}
            optimizer = torch.optim.Muon([theirs], lr=0.5, momentum=0.9, weight_decay=0.2, **options)
            chosen = MuonRules(product_dtype="bfloat16", scale=name, nesterov=nesterov)
            for step in range(3):
                gradient = draw_matrix(*shape, "gauss").roll(step, 0)
                theirs.grad = gradient.clone()
                before = weight.clone()
                optimizer.step()
                update_matrix(weight, momentum, gradient, None, SETTINGS, chosen, accelerator)
                moved = (weight - before).norm()
                far = float((weight - theirs.data).norm() / moved)
                if not far < (step + 1) * BF16_BOUND:
                    problems.append(f"{shape} {adjust} {nesterov} {step}: {far:.1e}")
                if not torch.allclose(momentum, optimizer.state[theirs]["momentum_buffer"], rtol=1e-6, atol=1e-7):
                    problems.append(f"{shape} {adjust} {nesterov} {step}: momentum")
    return problems


def scale_gradients() -> list[str]:
    """1e-12 to 1e20, with products in fp32 and in bf16: the same direction but for the rounding of the scaled input."""
    problems = []
    with opened() as accelerator:
        for dtype, form, bound in KINDS:
            rules = MuonRules(product_dtype=dtype, direction_dtype=dtype)
            gradient = draw_matrix(24, 40, "k^-1")
            wanted = _direction(gradient, rules, accelerator, form)
            for factor in (1e-12, 1e-6, 1e6, 1e12, 1e20):
                got = _direction(gradient * factor, rules, accelerator, form)
                far = float((got - wanted).norm() / wanted.norm())
                if not far < bound:
                    problems.append(f"{dtype} {form} {factor:g}: {far:.1e}")
    return problems


def _direction(gradient: Tensor, rules: MuonRules, accelerator: Accelerator, form: Form) -> Tensor:
    """What one step adds to a weight of zeros, per unit of learning rate."""
    weight, momentum = torch.zeros_like(gradient), torch.zeros_like(gradient)
    update_matrix(weight, momentum, gradient, None, MuonSettings(lr=1.0), rules, accelerator, form=form)
    return weight


def degenerate_gradients() -> list[str]:
    """Zero gives zero, and decay acts alone; rank one stays rank one."""
    problems = []
    with opened() as accelerator:
        for dtype, form, _ in KINDS:
            rules = MuonRules(product_dtype=dtype, direction_dtype=dtype, scale="spectral")
            weight, momentum = start((16, 16))
            before = weight.clone()
            update_matrix(weight, momentum, torch.zeros(16, 16), None, SETTINGS, rules, accelerator, form=form)
            if momentum.any() or not torch.allclose(weight, before * (1 - 0.5 * 0.2), rtol=1e-6):
                problems.append(f"{dtype} {form}: zero")
            one = torch.outer(torch.linspace(-1, 1, 16), torch.linspace(1, 2, 16))
            values = torch.linalg.svdvals(_direction(one, rules, accelerator, form).double())
            stays = float(values[1]) < 0.05 or dtype == "bfloat16"  # rounded to bf16, it has full rank
            if not (0.6 < float(values[0]) < 1.3 and bool(torch.isfinite(values).all()) and stays):
                problems.append(f"{dtype} {form}: rank one has {values[:3].tolist()}")
    return problems
