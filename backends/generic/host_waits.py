"""How the host waits for a device without being caught in it.

The runtime's own wait cannot be left: while a peer is dead, a device waits for it in a collective, and a host that
waits for the device inside the runtime hears of nothing. So where there are peers the host asks the event again and
again, and somebody looks after them meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

SPIN_SECONDS: Final = 0.001  # what is nearly over is not slept through
LOOK_SECONDS: Final = 0.2  # between looks at the peers, which cost some microseconds each
_FIRST_SLEEP: Final = 0.00005
_LONGEST_SLEEP: Final = 0.0002  # on average half of it is lost with each wait


class HostWait:
    """Waits for events of a device module: inside its runtime, or where there is a watch, by asking."""

    def __init__(
        self,
        watch: Callable[[], None] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._watch = watch
        self._clock = clock
        self._sleep = sleep

    @property
    def is_watched(self) -> bool:
        """Whether waits are left when the watch raises."""
        return self._watch is not None

    def look_after(self, watch: Callable[[], None]) -> None:
        """Have `watch` called every now and then while the host waits; what it raises ends the wait."""
        self._watch = watch

    def block(self, event: Any) -> None:
        """Block the host until an event of the device module has happened, then let the watch have a last look.

        The last look is for libraries that end a collective which failed as if it had gone well.
        """
        if self._watch is None:
            event.synchronize()
            return
        begun = looked = self._clock()
        pause = _FIRST_SLEEP
        while not event.query():
            now = self._clock()
            if now - looked >= LOOK_SECONDS:
                self._watch()
                looked = now
            if now - begun >= SPIN_SECONDS:
                self._sleep(pause)
                pause = min(2 * pause, _LONGEST_SLEEP)
        self._watch()
