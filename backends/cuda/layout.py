"""Where a GPU sits in its machine, as Linux shows it in files: the PCI link, and the nodes of memory.

Everything here is a function of a folder, so that tests make the machines they need.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from windlass.backends.cpu.system_files import read_words

SYSTEM: Final = Path("/sys")

_GENERATIONS: Final = {"2.5": 1, "5.0": 2, "5": 2, "8.0": 3, "8": 3, "16.0": 4, "32.0": 5, "64.0": 6}
"""PCI Express by its transfers per second and lane, in 10^9."""


@dataclass(frozen=True)
class Node:
    """One node of memory of the machine (NUMA). Without CPUs it may be the memory of a GPU."""

    number: int
    cpus: frozenset[int]
    memory: int  # bytes
    distances: tuple[int, ...]  # to each node, in the order of their numbers; 10 to itself


@dataclass(frozen=True)
class Link:
    """A PCI Express link; None where the system does not say, as in many virtual machines."""

    generation: int | None
    width: int | None  # lanes
    most_generation: int | None
    """What device and slot can do: an idle link is slower than that, to save power."""
    most_width: int | None


def read_nodes(system: Path = SYSTEM) -> tuple[Node, ...]:
    """The nodes in the order of their numbers; none where the system has no such notion."""
    folders = [path for path in system.glob("devices/system/node/node*") if path.name[4:].isdecimal()]
    nodes = []
    for folder in sorted(folders, key=lambda path: int(path.name[4:])):
        cpus, distances = parse_cpus(read_words(folder / "cpulist")), read_words(folder / "distance").split()
        memory = parse_node_memory(read_words(folder / "meminfo"))
        nodes.append(Node(int(folder.name[4:]), cpus, memory, tuple(int(number) for number in distances)))
    return tuple(nodes)


def read_link(address: str, system: Path = SYSTEM) -> Link:
    """The link of the PCI device at an address such as "0000:9b:00.0"."""
    folder = system / "bus/pci/devices" / address
    return Link(
        parse_generation(read_words(folder / "current_link_speed")),
        parse_width(read_words(folder / "current_link_width")),
        parse_generation(read_words(folder / "max_link_speed")),
        parse_width(read_words(folder / "max_link_width")),
    )


def find_node(
    address: str, nodes: tuple[Node, ...], host_node: int | None = None, system: Path = SYSTEM
) -> Node | None:
    """The node of the host's memory that lies nearest to a GPU, None where nobody knows.

    `host_node` is what the driver says. A node without CPUs is no answer, for it is the GPU's own memory; then the one
    with CPUs that is nearest to it is.
    """
    by_number = {node.number: node for node in nodes}
    with_cpus = [node for node in nodes if node.cpus]
    if len(with_cpus) == 1:
        return with_cpus[0]
    told = read_words(system / "bus/pci/devices" / address / "numa_node")
    shown = int(told) if told.removeprefix("-").isdecimal() else -1
    for number in (host_node, shown):
        node = None if number is None else by_number.get(number)
        if node is not None and node.cpus:
            return node
    own = by_number.get(shown)
    if own is None or len(own.distances) != len(nodes) or not with_cpus:
        return None
    order = [node.number for node in nodes]
    return min(with_cpus, key=lambda node: (own.distances[order.index(node.number)], node.number))


def parse_cpus(text: str) -> frozenset[int]:
    """ "0-3,8" as {0, 1, 2, 3, 8}; nothing as no CPUs."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus.update(range(int(first), int(last or first) + 1))
    return frozenset(cpus)


def spell_cpus(cpus: frozenset[int]) -> str:
    """The inverse of `parse_cpus`."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and cpu == ranges[-1][1] + 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def parse_node_memory(text: str) -> int:
    """Bytes of a node from its meminfo: "Node 0 MemTotal:       503000000 kB"; 0 where it has none."""
    for line in text.splitlines():
        words = line.split()
        if "MemTotal:" in words[:-1]:
            return int(words[words.index("MemTotal:") + 1]) * 1024
    return 0


def parse_generation(text: str) -> int | None:
    """ "32.0 GT/s PCIe" as 5; None for "Unknown" and nothing."""
    words = text.split()
    return _GENERATIONS.get(words[0]) if words else None


def parse_width(text: str) -> int | None:
    """ "16" as 16; 0 and 255 mean that there is no such link."""
    return int(text) if text.isdecimal() and 0 < int(text) < 255 else None
