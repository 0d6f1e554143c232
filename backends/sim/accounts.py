"""The books of one tier of memory, whose size is known."""

from __future__ import annotations

from dataclasses import dataclass, field

from windlass.backends.cpu.accounts import Account


@dataclass
class Tier(Account):
    """What is allocated, and how much may be: bytes, as in `Account`."""

    capacity: int = field(kw_only=True)

    @property
    def limit(self) -> int:
        return self.capacity if self.budget is None else min(self.budget, self.capacity)

    @property
    def free(self) -> int:
        return self.limit - self.used
