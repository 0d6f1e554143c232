"""The books of one place of memory, in bytes."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field


@dataclass
class Account:
    """What is used now, by tag, and was used at most since the peak was last reset."""

    used: int = 0
    reserved: int = 0
    peak: int = 0
    budget: int | None = None
    by_tag: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))

    def room(self, capacity: int | None) -> tuple[int | None, int | None]:
        """What is left of the budget, and of the capacity; None where there is no such limit."""
        of_budget = None if self.budget is None else self.budget - self.used
        return of_budget, None if capacity is None else capacity - self.used

    def add(self, tag: str, nbytes: int, reserved: int) -> None:
        """Enter an allocation, or by negative numbers its release."""
        self.used += nbytes
        self.reserved += reserved
        self.peak = max(self.peak, self.used)
        self.by_tag[tag] += nbytes
        if self.by_tag[tag] == 0:
            del self.by_tag[tag]
