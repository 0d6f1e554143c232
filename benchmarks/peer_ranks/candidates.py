"""Who takes part in a comparison, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

RANKS = 2
SYSTEMS = ("ddp", "fsdp2", "deepspeed", "windlass")
STAGES = ("0", "1", "2", "3")
APART = "apart"  # the variant whose query, key and value are matrices of their own: another training by intent


@dataclass(frozen=True)
class Candidate:
    """One way to train the model, and how its ranks are started."""

    system: str
    script: str
    precision: str
    stage: int | None = None
    variant: str = ""
    optimizer: Literal["adamw", "muon"] = "adamw"
    ranks: int = RANKS

    @property
    def name(self) -> str:
        """What `--profile` calls it."""
        optimizer = "" if self.optimizer == "adamw" else self.optimizer
        return "-".join(
            str(part) for part in (self.system, optimizer, self.variant, self.stage) if part not in ("", None)
        )


FLOOR = Candidate("floor", "floor.py", "autocast")
PLAIN_MUON = Candidate("plain", "plain.py", "fp32", optimizer="muon", ranks=1)
ALONE_MUON = Candidate("floor", "floor.py", "autocast", optimizer="muon")


def list_candidates(systems: Sequence[str], stages: Sequence[int]) -> list[Candidate]:
    """All candidates but the floor, in the order of the table."""
    candidates = []
    if "ddp" in systems:
        candidates.append(Candidate("ddp", "ddp.py", "autocast"))
    if "fsdp2" in systems:
        for variant in ("reshard", "noreshard"):
            candidates.append(Candidate("fsdp2", "fsdp2.py", "bf16 weights", variant=variant))
    if "deepspeed" in systems:
        candidates += [Candidate("deepspeed", "deepspeed_zero.py", "bf16 weights", stage) for stage in stages]
    if "windlass" in systems:
        for variant, precision in (("autocast", "autocast"), ("bf16", "bf16 weights")):
            candidates += [Candidate("windlass", "windlass_zero.py", precision, stage, variant) for stage in stages]
    return candidates


def list_muon_candidates(systems: Sequence[str], stages: Sequence[int]) -> list[Candidate]:
    """Those of the comparison with Muon, but the floor: two runs to check losses with, the peers, windlass with Muon,
    and with AdamW."""
    candidates = [PLAIN_MUON, ALONE_MUON]
    if "ddp" in systems:
        candidates.append(Candidate("ddp", "ddp.py", "autocast", optimizer="muon"))
    if "fsdp2" in systems:
        candidates.append(Candidate("fsdp2", "fsdp2.py", "bf16 weights", variant="reshard", optimizer="muon"))
    if "deepspeed" in systems:
        for stage in stages:
            if stage in (0, 2):
                candidates.append(Candidate("deepspeed", "deepspeed_zero.py", "bf16 weights", stage, optimizer="muon"))
            if stage == 2:  # clipped, it shortens every update; unclipped, it is the training of the others
                variant = "unclipped"
                candidates.append(
                    Candidate("deepspeed", "deepspeed_zero.py", "bf16 weights", stage, variant, optimizer="muon")
                )
    if "windlass" in systems:
        script, precision = "windlass_zero.py", "bf16 weights"
        candidates += [Candidate("windlass", script, precision, stage, "bf16", "muon") for stage in stages]
        if 2 in stages:
            candidates.append(Candidate("windlass", script, precision, 2, APART, "muon"))
        candidates += [Candidate("windlass", script, precision, stage, "bf16") for stage in stages]
    return candidates


def order_round(candidates: Sequence[Candidate], number: int) -> list[Candidate]:
    """The runs of one round: the floor first, in the middle and last, and every second round backwards.

    The rows of each system are spread over the whole round: in one block, a passing load would look like its fault.
    """
    families: dict[tuple[str, str, str], list[Candidate]] = {}
    for candidate in candidates:
        families.setdefault((candidate.system, candidate.precision, candidate.optimizer), []).append(candidate)
    places = {each: (index + 0.5) / len(family) for family in families.values() for index, each in enumerate(family)}
    ordered = sorted(candidates, key=places.__getitem__, reverse=number % 2 == 1)
    half = (len(ordered) + 1) // 2
    return [FLOOR, *ordered[:half], FLOOR, *ordered[half:], FLOOR]
