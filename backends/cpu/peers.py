"""Who the other ranks are as processes: whether they run on this host, and whether they still live."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Peer:
    """A rank as a process. The start time tells it from a later process with the same number."""

    rank: int
    host: str  # the boot of a machine, and the namespace in which process numbers mean something
    pid: int
    start_time: str  # in clock ticks since the boot

    def is_alive(self) -> bool:
        """Whether the process runs, as seen from its own host: gone, a zombie or another process is dead."""
        state = _read_process(self.pid)
        return state is not None and state[0] not in "ZX" and state[1] == self.start_time

    def is_visible(self, host: str) -> bool:
        """Whether it runs on `host` and is found there under the number it gave."""
        return self.host == host and self.is_alive()

    def to_text(self) -> str:
        return json.dumps(asdict(self))


def read_peer(text: str) -> Peer:
    """The inverse of `Peer.to_text`."""
    return Peer(**json.loads(text))


def describe_self(rank: int) -> Peer:
    """This process."""
    state = _read_process(os.getpid())
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if state is None or not boot.exists():  # no /proc: nobody can be recognised, so nobody is on the same host
        return Peer(rank, f"unknown host of rank {rank}", os.getpid(), "")
    return Peer(rank, f"{boot.read_text().strip()} {os.readlink(namespace)}", os.getpid(), state[1])


def _read_process(pid: int) -> tuple[str, str] | None:
    """State letter and start time of a process; None if there is none. See proc_pid_stat(5)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return fields[0], fields[19]
