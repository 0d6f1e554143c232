"""The plan as a page that a person reads: what is where, what moves when, and how much."""

from __future__ import annotations

from collections.abc import Iterable

from windlass.core.muon_text import describe_muon
from windlass.core.plan import Plan, Traffic
from windlass.core.text_numbers import format_bytes, format_count

_WEIGHTS = {
    "resident": "every rank holds all weights",
    "gathered": "every rank holds a shard; a unit's weights are gathered for its use",
}
_REDUCE = {
    "boundary": "once per optimizer step",
    "unit": "unit by unit, in each backward",
}
_UPDATE = {
    "replicated": "every rank updates everything from the same gradients",
    "shard": "every rank updates its shard",
}
_AFTER = {
    "nothing": "nothing to send, all ranks computed the same",
    "all_gather": "all-gathered into every rank's weights",
    "publish": "published; the next gather reads them",
}


def render_plan(plan: Plan) -> str:
    """The text of `windlass plan` and of `print(engine.plan)`."""
    facts, rules = plan.facts, plan.rules
    shards = plan.mesh.size("shard")
    lines = [
        f"Plan {plan.hash}: ZeRO stage {plan.stage}, {format_count(shards, 'rank', 'ranks')}, {plan.precision}, "
        f"{format_count(plan.gradient_accumulation_steps, 'micro-step', 'micro-steps')} per step",
    ]
    if facts:
        lines.append(
            f"  {facts['parameters']:,} parameters, {facts['trainable']:,} of them trainable, in {len(plan.units)} "
            f"units and {len(plan.regions)} regions; {facts['padding']:,} elements of padding"
        )
    lines += [
        "",
        "Rules",
        f"  weights    {_WEIGHTS[rules.weights]}",
        f"  gradients  reduced {_REDUCE[rules.reduce_at]}",
        f"  update     {_UPDATE[rules.update]}{_describe_update(plan)}",
        f"  afterwards {_AFTER[rules.after_update]}",
        "",
        "Memory per rank between steps",
    ]
    lines += [f"  {tag:<14}{format_bytes(size):>12}" for tag, size in plan.prediction.persistent.items()]
    lines.append(f"  {'total':<14}{format_bytes(sum(plan.prediction.persistent.values())):>12}")
    if plan.prediction.working:
        lines.append("and, until the update")
        lines += [f"  {tag:<14}{format_bytes(size):>12}" for tag, size in plan.prediction.working.items()]
    lines += ["", "Received per rank"]
    for title, part in (
        ("first micro-step", plan.prediction.first_micro_step),
        ("later micro-steps", plan.prediction.micro_step),
        ("boundary", plan.prediction.boundary),
    ):
        lines += _traffic(title, part)
    lines += _differing_traffic(plan)
    if rules.buffers == "per_use" and plan.slot_bytes:
        largest = format_bytes(sum(plan.slot_bytes))
        lines.append(f"and, gathered at a time, up to {largest}")
    if plan.muon is not None:
        lines += describe_muon(plan, plan.muon)
    lines += ["", "Units, in forward order" + (", with their gather slot" if plan.slot_bytes else "")]
    for unit in plan.units:
        regions = [plan.region_by_name[name] for name in unit.regions]
        numel = sum(one.numel for region in regions for one in region.placements)
        slot = "" if unit.slot is None else f"  slot {unit.slot}"
        dtypes = ", ".join(dict.fromkeys(region.dtype for region in regions))
        lines.append(f"  {unit.name or '(root)':<32}{numel:>14,} {dtypes}{slot}")
    return "\n".join(lines)


def _describe_update(plan: Plan) -> str:
    """What is out of the ordinary about it."""
    replayed = "; recorded once and replayed" if plan.rules.issue == "captured" else ""
    return replayed + ("" if plan.moment_dtype == "float32" else f"; moments in {plan.moment_dtype}")


def _traffic(title: str, part: Iterable[Traffic]) -> list[str]:
    rows = [
        f"{one.kind} {one.tag}: {format_count(one.calls, 'call', 'calls')}, {format_bytes(one.bytes)}" for one in part
    ]
    return [f"  {title:<18}{rows[0] if rows else 'nothing'}", *[f"  {'':<18}{row}" for row in rows[1:]]]


def _differing_traffic(plan: Plan) -> list[str]:
    """What ranks do not receive alike, at the boundary too."""
    lines = []
    for parts in zip(*plan.prediction.by_rank, strict=True):
        sizes = [one.bytes for one in parts]
        mean = format_bytes(sum(sizes) / len(sizes))
        most = f" on average, {format_bytes(max(sizes))} at most" if max(sizes) > min(sizes) else ""
        calls = format_count(parts[0].calls, "call", "calls")
        lines.append(f"  {'':<18}{parts[0].kind} {parts[0].tag}: {calls}, {mean}{most}")
    return lines
