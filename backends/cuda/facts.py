"""What is known about a GPU and the machine around it, as plain data for reports and for the planner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from windlass.backends.cpu.system_files import read_words
from windlass.backends.cuda.driver import Attribute, Driver, spell_version
from windlass.backends.cuda.layout import SYSTEM, Node, find_node, read_link, read_nodes, spell_cpus


def collect_facts(driver: Driver, index: int, runtime: str, system: Path = SYSTEM) -> dict[str, Any]:
    """The facts of device `index`, JSON-ready. `runtime` is the CUDA that torch was built for. None: nobody knows."""
    address = driver.pci_address(index)
    nodes = read_nodes(system)
    near = find_near_node(driver, index, nodes, system)
    link = read_link(address, system)
    major, minor = driver.compute_capability(index)
    return {
        "compute_capability": f"{major}.{minor}",
        "multiprocessors": driver.attribute(index, Attribute.MULTIPROCESSOR_COUNT),
        "memory_bytes": driver.memory(index),
        "memory_bus_bits": driver.try_attribute(index, Attribute.MEMORY_BUS_BITS),
        "l2_cache_bytes": driver.try_attribute(index, Attribute.L2_CACHE_BYTES),
        "shared_memory_bytes": driver.try_attribute(index, Attribute.SHARED_MEMORY_BYTES),
        "driver_cuda": spell_version(driver.version()),
        "driver_version": parse_driver_version(read_words(system / "module/nvidia/version")),
        "runtime_cuda": runtime,
        "pci_address": address,
        "pcie": {
            "generation": link.most_generation or link.generation,
            "width": link.most_width or link.width,
            "generation_now": link.generation,
            "width_now": link.width,
        },
        "coherent": is_coherent(driver, index),
        "numa_node": None if near is None else near.number,
        "numa_cpus": None if near is None else spell_cpus(near.cpus),
        "numa_nodes": [
            {"node": node.number, "cpus": spell_cpus(node.cpus), "memory_bytes": node.memory} for node in nodes
        ],
    }


def is_coherent(driver: Driver, index: int) -> bool:
    """Whether device and host share page tables, as on Grace-Hopper: each reads the other's memory where it lies."""
    reads_pages = driver.try_attribute(index, Attribute.PAGEABLE_MEMORY_ACCESS)
    return bool(reads_pages and driver.try_attribute(index, Attribute.USES_HOST_PAGE_TABLES))


def find_near_node(driver: Driver, index: int, nodes: tuple[Node, ...], system: Path = SYSTEM) -> Node | None:
    """The node of the host's memory nearest to device `index`, None where nobody knows."""
    return find_node(driver.pci_address(index), nodes, driver.try_attribute(index, Attribute.HOST_NUMA_ID), system)


def describe_allocator(statistics: Mapping[str, Any], snapshot_settings: Mapping[str, Any]) -> dict[str, Any]:
    """How torch's caching allocator is doing, from `memory_stats()` and its settings; bytes and counts.

    `inactive_split_bytes` is memory that it holds in pieces and can neither give back nor use for something larger.
    """
    return {
        "allocated_bytes": statistics.get("allocated_bytes.all.current"),
        "reserved_bytes": statistics.get("reserved_bytes.all.current"),
        "inactive_split_bytes": statistics.get("inactive_split_bytes.all.current"),
        "allocation_retries": statistics.get("num_alloc_retries"),
        "out_of_memory": statistics.get("num_ooms"),
        "expandable_segments": snapshot_settings.get("expandable_segments"),
    }


def parse_driver_version(text: str) -> str | None:
    """ "580.65.06" from /sys/module/nvidia/version; None where there is none, as in some containers."""
    words = text.split()
    return words[0] if words else None
