"""What Muon must come to: one matrix in double precision by formula, and a whole training in one process.

[Note: replay] The replay runs plain PyTorch forward and backward on each rank's rows in turn, adds the gradients up in
the order of the ranks, and updates each matrix alone with `update_matrix`, which the double-precision formula has
judged before. AdamW is torch's own: within its rounding of what the engine had, whose values the next step then starts
from, so that Muon's matrices can be compared to the bit. With clipping, so does the norm that the engine found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from muon_models import batch_of, build, find_split, muon_names
from windlass.accelerator.interface import Accelerator
from windlass.accelerator.polar import Coefficients
from windlass.conformance.training import my_part
from windlass.core.muon import MuonSettings, update_matrix
from windlass.core.muon_plan import MuonPlan

LR, ADAM_LR, MOMENTUM, DECAY = 0.02, 0.01, 0.9, 0.1
ADAMW_BOUND = 1e-6
"""Of the distance between our AdamW and torch's after one step, by norm: the bound of tests/ranks/test_oracle.py."""
LATE_BOUND = 2e-6


@dataclass(frozen=True)
class Case:
    """One training."""

    model: str
    stage: int
    accumulation: int = 1
    clip: float = 0.0
    precision: str = "fp32"
    ns_dtype: str = "fp32"
    scale: str = "rms"
    coefficients: str = "jordan"
    nesterov: bool = True
    own: bool = True  # matrices have owners at stage 0 too; else every rank works all of them out

    def __str__(self) -> str:
        """What is not as usual: the name of a test."""
        others = (one for one in fields(self) if one.name not in ("model", "stage"))
        unusual = [f"{one.name}={value}" for one in others if (value := getattr(self, one.name)) != one.default]
        return "-".join([self.model, str(self.stage), *unusual])

    @property
    def bound(self) -> float:
        """Of the distance from the reference, by norm. Where units leave one by one and ranks use different ones, late
        gradients are added in another order."""
        return LATE_BOUND if self.model == "Branching" and self.stage >= 2 else 0.0


@dataclass(frozen=True)
class Trace:
    """What a training left behind."""

    states: list[dict[str, Tensor]]  # after each step: all weights, fp32
    norms: list[float]
    momenta: dict[str, Tensor]


@dataclass
class Verdict:
    """What the replay found: nothing, if all is well."""

    problems: list[str] = field(default_factory=list)
    updates: int = 0  # of matrices


# -- one matrix, exactly -----------------------------------------------------------------------------------------


def update_exactly(
    weight: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    settings: MuonSettings,
    coefficients: Coefficients,
    scale: float,
    nesterov: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, momentum, direction) after one step, in double precision: the polynomials act on the singular values."""
    w, m, g = weight.double(), momentum.double(), gradient.double()
    m = settings.momentum * m + (1 - settings.momentum) * g
    blended = (1 - settings.momentum) * g + settings.momentum * m if nesterov else m
    left, values, right = torch.linalg.svd(blended, full_matrices=False)
    values = values / values.norm() if values.any() else values
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    direction: Tensor = (left * values) @ right
    w = w - settings.lr * settings.weight_decay * w - settings.lr * scale * direction
    return w, m, direction


def draw_matrix(rows: int, columns: int, spectrum: str) -> Tensor:
    """fp32 with known singular values: k^-1, k^-2, the first third of them 1 and the rest 0, or of a Gaussian."""
    generator = torch.Generator().manual_seed(rows * 1009 + columns)
    drawn = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if spectrum == "gauss":
        return drawn.float()
    left, values, right = torch.linalg.svd(drawn, full_matrices=False)
    place = torch.arange(1, len(values) + 1, dtype=torch.float64)
    new = {"k^-1": place**-1, "k^-2": place**-2, "deficient": (place <= math.ceil(len(place) / 3)).double()}
    shaped: Tensor = (left * new[spectrum]) @ right
    return shaped.float()


# -- a whole training ---------------------------------------------------------------------------------------------


def replay(case: Case, trace: Trace, ranks: int, plan: MuonPlan, accelerator: Accelerator) -> Verdict:
    """Compare a training on `ranks` ranks with the same in this process alone."""
    return _Replay(case, trace, ranks, plan, accelerator).run()


class _Replay:
    def __init__(self, case: Case, trace: Trace, ranks: int, plan: MuonPlan, accelerator: Accelerator) -> None:
        self.case, self.trace, self.ranks, self.plan, self.accelerator = case, trace, ranks, plan, accelerator
        self.module = build(case.model)
        trained = {name: one for name, one in self.module.named_parameters() if one.requires_grad}
        self.weights = {name: nn.Parameter(one.detach().clone()) for name, one in trained.items()}
        self.muon = muon_names(self.module)
        self.momenta = {name: torch.zeros_like(self.weights[name].data) for name in self.muon}
        others = [one for name, one in self.weights.items() if name not in self.muon]
        self.adamw = torch.optim.AdamW(others, lr=ADAM_LR, weight_decay=DECAY)
        self.verdict = Verdict()
        if case.precision != "fp32":
            self.module.to({"bf16": torch.bfloat16, "fp16": torch.float16}[case.precision])

    def run(self) -> Verdict:
        for step, state in enumerate(self.trace.states):
            sums = self._sum_gradients(step)
            scale = torch.tensor(1 / self.ranks) * self._clip_factor(sums, step)
            self._update_matrices(sums, scale)
            self._update_others(sums, scale)
            self._compare(step, state)
            with torch.no_grad():
                for name, parameter in self.module.named_parameters():
                    if name in self.weights:
                        parameter.copy_(self.weights[name])
        for name, momentum in self.momenta.items():
            self._require_equal(f"momentum of {name}", self.trace.momenta[name], momentum)
        return self.verdict

    def _sum_gradients(self, step: int) -> dict[str, Tensor]:
        """fp32 sums over ranks; each rank's micro-batches first where the plan reduces at the boundary."""
        count = self.case.accumulation
        terms = [[self._gradients(step, rank, micro) for micro in range(count)] for rank in range(self.ranks)]
        if self.case.stage >= 2:
            terms = [list(of_micro) for of_micro in zip(*terms, strict=True)]
        return _add_up([_add_up(inner) for inner in terms])

    def _gradients(self, step: int, rank: int, micro: int) -> dict[str, Tensor]:
        x, y = (my_part(t, rank, self.ranks, micro, self.case.accumulation) for t in batch_of(step))
        (self.module(x, y) / self.case.accumulation).backward()
        found = {}
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                found[name] = parameter.grad.float()
                parameter.grad = None
        return found

    def _clip_factor(self, sums: dict[str, Tensor], step: int) -> Tensor:
        """From the engine's own norm, once that is found to be right: sums of squares have no order to agree on."""
        norm = self.trace.norms[step]
        wanted = math.sqrt(sum(float((one.double() / self.ranks).square().sum()) for one in sums.values()))
        if abs(norm - wanted) > 2e-6 * wanted:
            self.verdict.problems.append(f"step {step}: norm {norm} is not {wanted}")
        if self.case.clip == 0:
            return torch.ones(())
        return torch.clamp(self.case.clip / (torch.tensor(norm) + 1e-6), max=1.0)

    @torch.no_grad()
    def _update_matrices(self, sums: dict[str, Tensor], scale: Tensor) -> None:
        settings = MuonSettings(LR, MOMENTUM, DECAY)
        for name in self.muon:
            split = find_split(name)
            assert split is not None
            if name not in sums:
                continue
            parts = (split(one) for one in (self.weights[name].data, self.momenta[name], sums[name]))
            for weight, momentum, gradient in zip(*parts, strict=True):
                form = self.plan.form_of(*weight.shape)
                given = (weight, momentum, gradient, None, settings, self.plan.rules, self.accelerator)
                update_matrix(*given, form=form, gradient_scale=scale)
                self.verdict.updates += 1

    def _update_others(self, sums: dict[str, Tensor], scale: Tensor) -> None:
        for name, weight in self.weights.items():
            if name not in self.muon:
                weight.grad = sums[name] * scale if name in sums else None
        self.adamw.step()

    @torch.no_grad()
    def _compare(self, step: int, state: dict[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            if name in self.muon:
                self._require_equal(f"step {step}: {name}", state[name], weight)
                continue
            far = float((state[name] - weight).norm() / weight.norm())
            if far > ADAMW_BOUND:
                self.verdict.problems.append(f"step {step}: {name}, of AdamW, is {far:.1e} from torch's")
            weight.copy_(state[name])

    def _require_equal(self, what: str, got: Tensor, wanted: Tensor) -> None:
        far = 0.0 if torch.equal(got, wanted) else float((got - wanted).norm() / wanted.norm())
        if not far <= self.case.bound:
            self.verdict.problems.append(f"{what} is {far:.1e} from the reference, not equal")


def _add_up(terms: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One after the other, in fp32; what has no gradient in any of them has none in the sum."""
    total: dict[str, Tensor] = {}
    for term in terms:
        for name, value in term.items():
            total[name] = total[name] + value if name in total else value
    return total
