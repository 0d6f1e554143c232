"""What the accelerator did: bytes and calls per collective and copy, kernel calls, host reads."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Calls made and bytes moved under one (kind, tag)."""

    calls: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class ProgramCounts:
    """What a device that compiles whole programs has done since it was opened, on this rank."""

    compiled: int = 0
    """Distinct programs, each of them compiled once. A Python number that changes makes another program."""
    executed: int = 0
    """Programs run: one for every cut of the graph, which a boundary or a host read within a step makes."""


def _tallies() -> defaultdict[tuple[str, str], Tally]:
    return defaultdict(Tally)


@dataclass
class Counters:
    """Counted by the backend where the thing happens, compared with the plan by whoever asks.

    Collective bytes are those one rank *receives from the others*: an all-gather or reduce-scatter
    of equal parts counts ``(size - 1) * part_bytes``, a reduction or exchange of whole vectors
    ``(size - 1) * bytes``, a broadcast ``bytes`` on every rank but its source.
    """

    collectives: defaultdict[tuple[str, str], Tally] = field(default_factory=_tallies)
    copies: defaultdict[tuple[str, str], Tally] = field(default_factory=_tallies)
    kernels: defaultdict[tuple[str, str], Tally] = field(default_factory=_tallies)
    host_reads: int = 0

    def count_collective(self, kind: str, tag: str, received: int) -> None:
        """Count one collective of `kind` that brought `received` bytes from other ranks."""
        tally = self.collectives[kind, tag]
        tally.calls += 1
        tally.bytes += received

    def count_copy(self, kind: str, tag: str, moved: int) -> None:
        """Count one copy of `moved` bytes; `kind` is "up", "down", "device" or "host"."""
        tally = self.copies[kind, tag]
        tally.calls += 1
        tally.bytes += moved

    def count_kernel(self, name: str, implementation: str) -> None:
        """Count one call of a kernel."""
        self.kernels[name, implementation].calls += 1

    def snapshot(self) -> dict[str, dict[str, int]]:
        """Everything so far as plain data, keys written ``kind/tag``; ``host_reads`` under "host"."""
        table: dict[str, dict[str, int]] = {"host": {"reads": self.host_reads}}
        for group, tallies in (("collective", self.collectives), ("copy", self.copies), ("kernel", self.kernels)):
            for (kind, tag), tally in sorted(tallies.items()):
                table[f"{group}/{kind}/{tag}"] = {"calls": tally.calls, "bytes": tally.bytes}
        return table

    def copy(self) -> Counters:
        """Everything so far, which later counting leaves as it is."""
        copied = Counters()
        copied.add(self)
        return copied

    def since(self, before: Counters) -> Counters:
        """What was counted after `before` was copied."""
        counted = self.copy()
        counted.add(before, times=-1)
        return counted

    def add(self, other: Counters, times: int = 1) -> None:
        """Count what `other` has counted so many times more; what comes to nothing is as if it never was."""
        for tallies, more in (
            (self.collectives, other.collectives),
            (self.copies, other.copies),
            (self.kernels, other.kernels),
        ):
            for key, tally in more.items():
                tallies[key].calls += times * tally.calls
                tallies[key].bytes += times * tally.bytes
                if not tallies[key].calls and not tallies[key].bytes:
                    del tallies[key]
        self.host_reads += times * other.host_reads

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.collectives.clear()
        self.copies.clear()
        self.kernels.clear()
        self.host_reads = 0
