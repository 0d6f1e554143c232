"""Simulated time: what each lane has come to, in seconds, at the rates of the machine that is simulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from windlass.accelerator.interface import LANES, Place

if TYPE_CHECKING:
    from windlass.backends.sim.machines import Machine


class Clock:
    """The time of every lane, and what things cost.

    An operation moves its lane's time. A work does not: it begins when its lane had come to its issue and the lane's
    earlier works are over, and whoever waits for it has come to its end at least. So what is not waited for overlaps.
    """

    def __init__(self, machine: Machine, lanes: Sequence[str] = LANES) -> None:
        self._machine = machine
        self._now = dict.fromkeys(lanes, 0.0)
        self._busy = dict.fromkeys(lanes, 0.0)  # until when the lane's works take
        self._link = 0.0  # until when copies both ways, taken together, keep the link busy

    # -- what things cost, in seconds ----------------------------------------------------------------------------

    def operation_seconds(self, nbytes: int, flops: float = 0.0, dtype: str = "float32") -> float:
        """An operation that moves `nbytes` through device memory and computes `flops` in matrix products."""
        seconds = nbytes / self._machine.device_bandwidth_bytes_per_s
        if flops:
            rates = self._machine.matmul_flop_per_s
            seconds = max(seconds, flops / rates.get(dtype, min(rates.values())))
        return seconds + self._machine.launch_latency_s

    def copy_seconds(self, source: Place, destination: Place, nbytes: int) -> float:
        """A copy, at the rate of the slowest part of its way. Within one memory every byte is read and written."""
        machine = self._machine
        if source is destination:
            within = {
                Place.DEVICE: 2 * nbytes / machine.device_bandwidth_bytes_per_s,
                Place.HOST: 2 * nbytes / machine.host_bandwidth_bytes_per_s,
                Place.DISK: nbytes / machine.disk_read_bytes_per_s + nbytes / machine.disk_write_bytes_per_s,
            }
            return within[source]
        rates = {
            (Place.HOST, Place.DEVICE): [machine.link_up_bytes_per_s],
            (Place.DEVICE, Place.HOST): [machine.link_down_bytes_per_s],
            (Place.DISK, Place.HOST): [machine.disk_read_bytes_per_s],
            (Place.HOST, Place.DISK): [machine.disk_write_bytes_per_s],
            (Place.DISK, Place.DEVICE): [machine.disk_read_bytes_per_s, machine.link_up_bytes_per_s],
            (Place.DEVICE, Place.DISK): [machine.link_down_bytes_per_s, machine.disk_write_bytes_per_s],
        }
        return nbytes / min(rates[source, destination])

    def link_seconds(self, source: Place, destination: Place, nbytes: int) -> float:
        """How long a copy keeps the link from others in either direction; nothing if it does not cross it."""
        crosses = (source is Place.DEVICE) != (destination is Place.DEVICE)
        return nbytes / self._machine.link_both_bytes_per_s if crosses else 0.0

    def network_seconds(self, received: int) -> float:
        """A collective that brings `received` bytes from other ranks."""
        return received / self._machine.network_bytes_per_s + self._machine.network_latency_s

    # -- time ----------------------------------------------------------------------------------------------------

    def now(self, lane: str) -> float:
        """What the lane has come to."""
        return self._now[lane]

    def latest(self) -> float:
        """When everything issued so far is over."""
        return max(*self._now.values(), *self._busy.values())

    def advance(self, lane: str, seconds: float) -> None:
        """An operation of the lane has taken `seconds`."""
        self._now[lane] += seconds

    def issue(self, lane: str, seconds: float, not_before: float = 0.0, link_seconds: float = 0.0) -> float:
        """The end of a work that takes `seconds` and is issued now; longer where other copies are on the link."""
        begin = max(self._now[lane], self._busy[lane], not_before)
        end = begin + seconds
        if link_seconds:
            self._link = max(self._link, begin) + link_seconds
            end = max(end, self._link)
        self._busy[lane] = end
        return end

    def reach(self, lane: str, time: float) -> None:
        """The lane has waited for something that ended at `time`."""
        self._now[lane] = max(self._now[lane], time)

    def level(self) -> None:
        """All lanes have waited for everything."""
        latest = self.latest()
        for lane in self._now:
            self._now[lane] = latest
