"""What is wanted of a GPU, and whether the rows of a run show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

State = Literal["met", "missed", "not measured"]
Rows = Sequence[dict[str, Any]]

_MASTERS: Final = ("torch, bf16 with fp32 masters", "torch, autocast over fp32")
_ALLOWED_LOSS: Final = 0.1  # relative distance of two losses of the same training in different roundings


@dataclass(frozen=True)
class Goal:
    """One goal beside what was seen."""

    goal: str
    wanted: str
    seen: str
    state: State

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def judge(rows: Rows) -> list[Goal]:
    """All goals in order. Those of speed hold for one H100 or H200 at full scale; elsewhere they only inform."""
    return [
        _conformance(rows),
        _tests(rows),
        _share(rows, "adamw: share of the rate of copies", 0.85, "adamw", "bf16 gradient"),
        _share(rows, "polar, 4096 x 4096: share of the rate of products", 0.70, "polar", "4096 x 4096,"),
        _share(rows, "polar_gram, 4096 x 16384: standard FLOPs over that rate", 1.0, "polar_gram", "4096 x 16384,"),
        _memory(rows),
        _faster(rows, "linear_cross_entropy: time over the plain one's", "linear_cross_entropy", ("torch, plain",)),
        _training(rows),
        _muon(rows),
    ]


def _conformance(rows: Rows) -> Goal:
    levels = [row for row in rows if row["part"] == "conformance" and row["name"].startswith("level ")]
    wanted = "levels 0 to 3 reached"
    if not levels:
        return Goal("conformance", wanted, "", "not measured")
    seen = ", ".join(f"{row['name']} {row['facts']['state']}" for row in levels)
    reached = {row["name"] for row in levels if row["facts"]["state"] == "reached"}
    return Goal("conformance", wanted, seen, "met" if reached >= {f"level {n}" for n in range(4)} else "missed")


def _tests(rows: Rows) -> Goal:
    found = [row for row in rows if row["part"] == "tests"]
    counted = [row for row in found if row["facts"].get("tests")]
    if not counted:
        return Goal("tests", "all pass", "", "not measured")
    seen = "; ".join(f"{row['name']}: {row['case']}" for row in counted)
    return Goal("tests", "all pass", seen, "missed" if any(row["error"] for row in found) else "met")


def _share(rows: Rows, goal: str, wanted: float, name: str, case: str) -> Goal:
    shares = [row["share"] for row in _measured(rows, name, "share") if row["ours"] and row["case"].startswith(case)]
    return _compare(goal, f">= {wanted:.0%}", max(shares, default=None), lambda seen: seen >= wanted)


def _memory(rows: Rows) -> Goal:
    goal, wanted = "linear_cross_entropy: peak over the plain one's", 1 / 8
    ratio = _ratio(rows, "linear_cross_entropy", "peak_bytes", ("torch, plain",))
    return _compare(goal, f"<= {wanted:.1%}", ratio, lambda seen: seen <= wanted, digits=1)


def _faster(rows: Rows, goal: str, name: str, others: Iterable[str]) -> Goal:
    return _compare(goal, "<= 100%", _ratio(rows, name, "seconds", others), lambda seen: seen <= 1.0)


def _training(rows: Rows) -> Goal:
    """Against the quicker of the two plain ones that keep fp32 masters, as windlass does."""
    goal = "training step: tokens/s over plain PyTorch's with fp32 masters"
    ours = [row for row in _measured(rows, "step", "value") if row["ours"]]
    theirs = [row for row in _measured(rows, "step", "value") if row["by"] in _MASTERS]
    if not ours or not theirs:
        return Goal(goal, ">= 100%", "", "not measured")
    best, plain = (max(group, key=lambda row: float(row["value"])) for group in (ours, theirs))
    losses = best["facts"]["loss"], plain["facts"]["loss"]  # None where one was not finite
    if None in losses or abs(losses[0] - losses[1]) > _ALLOWED_LOSS * abs(losses[1]):
        words = " and ".join("none" if loss is None else f"{loss:.3f}" for loss in losses)
        return Goal(goal, ">= 100%", f"losses {words}: another training, so its speed means nothing", "missed")
    seen = _compare(goal, ">= 100%", best["value"] / plain["value"], lambda ratio: ratio >= 1.0)
    return Goal(goal, seen.wanted, f"{seen.seen} ({best['by']})", seen.state)


def _muon(rows: Rows) -> Goal:
    shares = [row["facts"]["share_of_step"] for row in rows if row["ours"] and "share_of_step" in row["facts"]]
    goal = "Muon's step (its kernels): share of a step of 64 k tokens"
    return _compare(goal, "<= 5%", min(shares, default=None), lambda seen: seen <= 0.05, digits=1)


def _measured(rows: Rows, name: str, key: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["name"] == name and row[key] is not None and not row["error"]]


def _ratio(rows: Rows, name: str, key: str, others: Iterable[str]) -> float | None:
    """Our best figure over their best."""
    found = _measured(rows, name, key)
    ours = [float(row[key]) for row in found if row["ours"]]
    theirs = [float(row[key]) for row in found if row["by"] in tuple(others)]
    return min(ours) / min(theirs) if ours and theirs and min(theirs) > 0 else None


def _compare(goal: str, wanted: str, seen: float | None, good: Callable[[float], bool], digits: int = 0) -> Goal:
    if seen is None:
        return Goal(goal, wanted, "", "not measured")
    return Goal(goal, wanted, f"{seen:.{digits}%}", "met" if good(seen) else "missed")
