"""What is known about a GPU's machine, from folders as Linux shows them on machines that are made up here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretend_driver import PretendGpu, make_driver
from windlass.backends.cuda.driver import Attribute, spell_version
from windlass.backends.cuda.facts import collect_facts, describe_allocator
from windlass.backends.cuda.layout import (
    Link,
    find_node,
    parse_cpus,
    parse_generation,
    parse_node_memory,
    parse_width,
    read_link,
    read_nodes,
    spell_cpus,
)

GPU = "0000:9b:00.0"
GIB = 2**30


def add_node(system: Path, number: int, cpus: str, kilobytes: int, distances: str) -> None:
    folder = system / f"devices/system/node/node{number}"
    folder.mkdir(parents=True)
    (folder / "cpulist").write_text(cpus + "\n")
    (folder / "distance").write_text(distances + "\n")
    (folder / "meminfo").write_text(f"Node {number} MemTotal:       {kilobytes} kB\nNode {number} MemFree:  1 kB\n")


def add_gpu(
    system: Path, node: int, now: str = "2.5 GT/s PCIe", most: str = "32.0 GT/s PCIe", width: str = "16"
) -> None:
    folder = system / "bus/pci/devices" / GPU
    folder.mkdir(parents=True)
    for name, text in (
        ("numa_node", str(node)),
        ("current_link_speed", now),
        ("max_link_speed", most),
        ("current_link_width", width),
        ("max_link_width", width),
    ):
        (folder / name).write_text(text + "\n")


@pytest.fixture
def x86(tmp_path: Path) -> Path:
    """Two sockets of 4 CPUs, whose second threads come after all first ones; the GPU at the second."""
    add_node(tmp_path, 0, "0-3,8-11", 512 * 2**20, "10 21")
    add_node(tmp_path, 1, "4-7,12-15", 512 * 2**20, "21 10")
    add_gpu(tmp_path, 1)
    (tmp_path / "module/nvidia").mkdir(parents=True)
    (tmp_path / "module/nvidia/version").write_text("580.65.06\n")
    return tmp_path


@pytest.fixture
def grace(tmp_path: Path) -> Path:
    """Two Grace-Hopper superchips: nodes 0 and 1 are processors, 2 and 10 the memory of the GPUs."""
    add_node(tmp_path, 0, "0-71", 480 * 2**20, "10 40 80 120")
    add_node(tmp_path, 1, "72-143", 480 * 2**20, "40 10 120 80")
    add_node(tmp_path, 2, "", 96 * 2**20, "80 120 10 160")
    add_node(tmp_path, 10, "", 96 * 2**20, "120 80 160 10")
    add_gpu(tmp_path, 10, now="Unknown", most="Unknown", width="0")
    return tmp_path


@pytest.fixture
def machine_in_a_cloud(tmp_path: Path) -> Path:
    add_node(tmp_path, 0, "0-15", 64 * 2**20, "10 20")
    add_node(tmp_path, 1, "16-31", 64 * 2**20, "20 10")
    add_gpu(tmp_path, -1)
    return tmp_path


def test_two_sockets(x86: Path) -> None:
    nodes = read_nodes(x86)
    assert [(node.number, spell_cpus(node.cpus), node.memory) for node in nodes] == [
        (0, "0-3,8-11", 512 * GIB),
        (1, "4-7,12-15", 512 * GIB),
    ]
    node = find_node(GPU, nodes, None, x86)
    assert node is not None
    assert (node.number, len(node.cpus)) == (1, 8)
    assert read_link(GPU, x86) == Link(1, 16, 5, 16)


@pytest.mark.parametrize("told", [1, None, -1])
def test_a_superchip_whose_gpu_is_a_node_of_its_own(grace: Path, told: int | None) -> None:
    nodes = read_nodes(grace)
    assert [node.number for node in nodes] == [0, 1, 2, 10]
    node = find_node(GPU, nodes, told, grace)
    assert node is not None
    assert spell_cpus(node.cpus) == "72-143"
    assert read_link(GPU, grace) == Link(None, None, None, None)


def test_a_driver_that_says_the_node_is_believed(grace: Path) -> None:
    node = find_node(GPU, read_nodes(grace), 0, grace)
    assert node is not None
    assert node.number == 0


def test_nobody_knows_the_node_in_a_virtual_machine(machine_in_a_cloud: Path) -> None:
    assert find_node(GPU, read_nodes(machine_in_a_cloud), None, machine_in_a_cloud) is None
    assert find_node(GPU, read_nodes(machine_in_a_cloud), -1, machine_in_a_cloud) is None


def test_the_only_node_is_the_nearest(tmp_path: Path) -> None:
    add_node(tmp_path, 0, "0-15", 64 * 2**20, "10")
    add_gpu(tmp_path, -1)
    node = find_node(GPU, read_nodes(tmp_path), None, tmp_path)
    assert node is not None
    assert node.number == 0


def test_a_system_that_shows_nothing(tmp_path: Path) -> None:
    assert read_nodes(tmp_path) == ()
    assert find_node(GPU, (), None, tmp_path) is None
    assert read_link(GPU, tmp_path) == Link(None, None, None, None)


@pytest.mark.parametrize("text", ["", "0", "0-3", "0-3,8-11", "2,4,6-7"])
def test_lists_of_cpus_there_and_back(text: str) -> None:
    assert spell_cpus(parse_cpus(text + "\n")) == text


def test_what_the_system_writes() -> None:
    speeds = ("8.0 GT/s PCIe", "16.0 GT/s PCIe", "64.0 GT/s PCIe", "5 GT/s", "Unknown")
    assert [parse_generation(text) for text in speeds] == [3, 4, 6, 2, None]
    assert [parse_width(text) for text in ("16", "1", "0", "255", "")] == [16, 1, None, None, None]
    assert parse_node_memory("Node 1 MemTotal:  1024 kB\n") == 2**20
    assert parse_node_memory("Node 1 MemFree:  1024 kB\n") == 0
    assert [spell_version(number) for number in (12080, 13000, 11040)] == ["12.8", "13.0", "11.4"]


def test_the_facts_of_a_card(x86: Path) -> None:
    facts = collect_facts(make_driver(PretendGpu()), 0, "12.8", x86)
    assert json.loads(json.dumps(facts)) == facts
    assert facts == {
        "compute_capability": "9.0",
        "multiprocessors": 132,
        "memory_bytes": 150_110_011_392,
        "memory_bus_bits": 6144,
        "l2_cache_bytes": 60 * 2**20,
        "shared_memory_bytes": 227 * 2**10,
        "driver_cuda": "13.0",
        "driver_version": "580.65.06",
        "runtime_cuda": "12.8",
        "pci_address": GPU,
        "pcie": {"generation": 5, "width": 16, "generation_now": 1, "width_now": 16},
        "coherent": False,
        "numa_node": 1,
        "numa_cpus": "4-7,12-15",
        "numa_nodes": [
            {"node": 0, "cpus": "0-3,8-11", "memory_bytes": 512 * GIB},
            {"node": 1, "cpus": "4-7,12-15", "memory_bytes": 512 * GIB},
        ],
    }


def test_the_facts_of_a_superchip(grace: Path) -> None:
    shared = {Attribute.PAGEABLE_MEMORY_ACCESS: 1, Attribute.USES_HOST_PAGE_TABLES: 1, Attribute.HOST_NUMA_ID: 1}
    facts = collect_facts(make_driver(PretendGpu("NVIDIA GH200 480GB", attributes=shared)), 0, "12.8", grace)
    assert (facts["coherent"], facts["numa_node"], facts["numa_cpus"]) == (True, 1, "72-143")
    assert facts["pcie"] == {"generation": None, "width": None, "generation_now": None, "width_now": None}
    assert facts["driver_version"] is None


def test_a_card_that_reads_pages_without_sharing_their_tables_is_not_coherent(x86: Path) -> None:
    managed = PretendGpu(attributes={Attribute.PAGEABLE_MEMORY_ACCESS: 1})
    assert collect_facts(make_driver(managed), 0, "12.8", x86)["coherent"] is False


def test_how_the_allocator_is_doing() -> None:
    statistics = {
        "allocated_bytes.all.current": 5,
        "reserved_bytes.all.current": 8,
        "inactive_split_bytes.all.current": 2,
        "num_alloc_retries": 1,
        "num_ooms": 0,
    }
    found = describe_allocator(statistics, {"expandable_segments": True})
    assert found == {
        "allocated_bytes": 5,
        "reserved_bytes": 8,
        "inactive_split_bytes": 2,
        "allocation_retries": 1,
        "out_of_memory": 0,
        "expandable_segments": True,
    }
    assert describe_allocator({}, {})["reserved_bytes"] is None
