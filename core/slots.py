"""Which unit's weights are in which gather slot: one pure table, used by the planner to predict and by the
executor to act, so that predictions are exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class SlotTable:
    """Contents of the gather slots. A slot keeps its unit until another one needs it or the weights change."""

    slot_of: dict[str, int]  # unit -> the slot that the plan gave it
    holds: dict[int, str] = field(default_factory=dict)  # slot -> unit whose current weights are in it
    users: dict[int, int] = field(default_factory=dict)  # slot -> how many callers are using it now

    def resident(self, unit: str, slot: int) -> bool:
        """True if the unit's current weights are in that slot."""
        return self.holds.get(slot) == unit

    def free_for(self, unit: str, slot: int) -> bool:
        """True if the unit could be put into the slot without taking it from a unit in use."""
        return self.holds.get(slot) in (None, unit) or not self.users.get(slot)

    def place(self, unit: str, slot: int) -> str | None:
        """Put the unit into the slot; returns the unit that had to leave, if any."""
        previous = self.holds.get(slot)
        self.holds[slot] = unit
        return previous if previous != unit else None

    def acquire(self, slot: int) -> None:
        """One more caller uses what is in the slot: it may not be taken."""
        self.users[slot] = self.users.get(slot, 0) + 1

    def release(self, slot: int) -> None:
        """One caller fewer; the weights stay until the slot is needed."""
        self.users[slot] = max(0, self.users.get(slot, 0) - 1)

    def in_use(self, unit: str) -> bool:
        """True while some caller that announced itself uses the unit."""
        slot = self.slot_of[unit]
        return self.holds.get(slot) == unit and self.users.get(slot, 0) > 0

    def add_slot(self, unit: str, slot: int) -> None:
        """Give the unit a slot of its own from now on."""
        self.slot_of[unit] = slot

    def invalidate(self) -> None:
        """The weights have changed: nothing in the slots is current."""
        self.holds.clear()


def assign_slots(units: Sequence[tuple[str, bool]], rotating: int) -> dict[str, int]:
    """Unit -> slot. Units that span others get a slot of their own; the rest take turns in `rotating` slots."""
    slots: dict[str, int] = {}
    turn = 0
    for name, spans in units:
        if not spans:
            slots[name] = turn % rotating
            turn += 1
    extra = min(rotating, turn)
    for name, spans in units:
        if spans:
            slots[name] = extra
            extra += 1
    return slots


def simulate_pass(table: SlotTable, order: Sequence[str], spans: Mapping[str, bool], prefetch: int) -> list[str]:
    """Units fetched by one pass over `order` (forward order, or the reverse for backward), in order.

    Units that span others are fetched first; they have slots of their own, so nothing drives them out.
    """
    fetched: list[str] = []

    def bring(unit: str) -> None:
        slot = table.slot_of[unit]
        if not table.resident(unit, slot):
            table.place(unit, slot)
            fetched.append(unit)

    inner = [unit for unit in order if not spans[unit]]
    for unit in order:
        if spans[unit]:
            bring(unit)
    for position, unit in enumerate(inner):
        bring(unit)
        table.acquire(table.slot_of[unit])
        for ahead in inner[position + 1 : position + 1 + prefetch]:
            if table.free_for(ahead, table.slot_of[ahead]):
                bring(ahead)
        table.release(table.slot_of[unit])
    return fetched
