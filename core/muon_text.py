"""What a plan's page says about Muon: who orthogonalises how much, in which form, and what travels for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from windlass.core.muon_plan import EVERYONE, MuonPlan
from windlass.core.plan import Plan
from windlass.core.text_numbers import format_bytes, format_count, format_flops

_SHAPES = 6
"""Shapes that are named one by one."""


def describe_muon(plan: Plan, muon: MuonPlan) -> list[str]:
    """Lines of a plan's page."""
    rules, costs = muon.rules, muon.prediction
    elements = sum(many.numel * len(many.owners) for many in muon.matrices)
    lines = [
        "",
        "Muon",
        f"  matrices    {format_count(muon.count, 'matrix', 'matrices')} with {elements:,} elements",
        f"  where       {_describe_owners(plan, muon)}",
        f"  products    {format_count(len(rules.coefficients), 'step', 'steps')} of Newton-Schulz in "
        f"{rules.product_dtype}; momentum in {rules.momentum_dtype}",
        *_describe_shapes(muon),
    ]
    busiest, total = max(costs.flops, default=0), sum(costs.flops)
    if len(costs.flops) > 1:
        mean = f"{format_flops(total / len(costs.flops))} per rank on average, the busiest {costs.balance:.2f} of that"
    else:
        mean = format_flops(busiest)
    lines.append(f"  work        {mean}, per step")
    if costs.calls:
        for title, received in (("inputs", costs.inward), ("directions", costs.outward)):
            if any(received):
                lines.append(f"  {title:<12}{_describe_received(received)}, in {rules.direction_dtype}")
    if muon.waves:
        lines.append(
            f"  a wave      of up to {format_bytes(costs.wave_bytes)} of matrices on a rank, up to three at a time"
        )
    return lines


def _describe_owners(plan: Plan, muon: MuonPlan) -> str:
    if plan.mesh.size("shard") == 1:
        return "on the only rank"
    if plan.rules.update == "replicated":
        everywhere = sum(many.owners.count(EVERYONE) for many in muon.matrices)
        if everywhere == muon.count:
            return "every rank works on all of them, for sending directions would take longer"
        rest = f"; every rank works on the other {everywhere:,}" if everywhere else ""
        return (
            f"{muon.count - everywhere:,} have an owner each, who sends its directions to all in one all_gather{rest}"
        )
    travelling = sum(map(len, muon.waves))
    whole = muon.count - travelling
    if not travelling:
        return "each lies whole with the rank that works on it: nothing travels"
    waves = format_count(len(muon.waves), "wave", "waves")
    return f"{whole:,} lie whole with the rank that works on them; {travelling:,} travel to it and back, in {waves}"


def _describe_shapes(muon: MuonPlan) -> list[str]:
    """How many matrices of each shape there are, and in which form, the most costly shapes first."""
    counts: Counter[tuple[int, int]] = Counter()
    for many in muon.matrices:
        counts[many.rows, many.columns] += len(many.owners)
    shapes = sorted(counts, key=lambda shape: (-(min(shape) ** 2) * max(shape) * counts[shape], shape))
    rows = [f"{counts[shape]:,} of {shape[0]} x {shape[1]}, {muon.form_of(*shape)} form" for shape in shapes[:_SHAPES]]
    if len(shapes) > _SHAPES:
        rest = sum(counts[shape] for shape in shapes[_SHAPES:])
        rows.append(f"and {rest:,} of {format_count(len(shapes) - _SHAPES, 'other shape', 'other shapes')}")
    return [f"  {'shapes' if number == 0 else '':<12}{row}" for number, row in enumerate(rows)]


def _describe_received(received: Sequence[int]) -> str:
    mean, most = sum(received) / len(received), max(received)
    return f"{format_bytes(mean)} received per rank and step, {format_bytes(most)} at most"
