"""What a stretch of a program counted, so that a replay of it counts the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from windlass.accelerator.counters import Counters, Tally

_Counts = dict[tuple[str, str], tuple[int, int]]  # (kind, tag) -> calls, bytes


@dataclass(frozen=True)
class Counted:
    """Calls and bytes by kind and tag."""

    collectives: _Counts
    copies: _Counts
    kernels: _Counts
    host_reads: int

    def add_to(self, counters: Counters) -> None:
        """Count all of it once more."""
        self._change(counters, 1)

    def take_from(self, counters: Counters) -> None:
        """Undo that it was counted."""
        self._change(counters, -1)

    def since(self, before: Counted) -> Counted:
        """What was counted after `before` was read."""
        return Counted(
            _subtract(self.collectives, before.collectives),
            _subtract(self.copies, before.copies),
            _subtract(self.kernels, before.kernels),
            self.host_reads - before.host_reads,
        )

    def _change(self, counters: Counters, sign: int) -> None:
        for tallies, counts in (
            (counters.collectives, self.collectives),
            (counters.copies, self.copies),
            (counters.kernels, self.kernels),
        ):
            for key, (calls, nbytes) in counts.items():
                tallies[key].calls += sign * calls
                tallies[key].bytes += sign * nbytes
                if not tallies[key].calls and not tallies[key].bytes:
                    del tallies[key]
        counters.host_reads += sign * self.host_reads


def read_counters(counters: Counters) -> Counted:
    """All that was counted so far."""
    return Counted(_copy(counters.collectives), _copy(counters.copies), _copy(counters.kernels), counters.host_reads)


def _copy(tallies: Mapping[tuple[str, str], Tally]) -> _Counts:
    return {key: (tally.calls, tally.bytes) for key, tally in tallies.items()}


def _subtract(after: _Counts, before: _Counts) -> _Counts:
    found = {}
    for key, (calls, nbytes) in after.items():
        calls_before, bytes_before = before.get(key, (0, 0))
        if (calls, nbytes) != (calls_before, bytes_before):
            found[key] = calls - calls_before, nbytes - bytes_before
    return found
