"""The books of one tier of memory, in bytes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass
class Account:
    """What is allocated, and how much may be."""

    capacity: int
    used: int = 0
    reserved: int = 0
    peak: int = 0
    budget: int | None = None
    by_tag: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def limit(self) -> int:
        return self.capacity if self.budget is None else min(self.budget, self.capacity)

    @property
    def free(self) -> int:
        return self.limit - self.used

    def add(self, tag: str, nbytes: int, reserved: int) -> None:
        self.used += nbytes
        self.reserved += reserved
        self.peak = max(self.peak, self.used)
        self.by_tag[tag] += nbytes
        if self.by_tag[tag] == 0:
            del self.by_tag[tag]
