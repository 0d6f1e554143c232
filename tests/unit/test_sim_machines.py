"""The machine files: complete, in plausible units, and each figure with its source."""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import fields
from typing import Any

import pytest

from windlass.backends.sim.machines import Machine, load_machine, machine_names, read_machine

NAMES = ("gh200", "h100-pcie5", "h200", "laptop", "tpu-v5e")


def content_of(name: str) -> dict[str, Any]:
    path = importlib.resources.files("windlass.backends.sim").joinpath("machines", f"{name}.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_names() -> None:
    assert machine_names() == NAMES


@pytest.mark.parametrize(
    ("name", "memory_gb", "bandwidth_gb", "up_gb", "bf16_tflops"),
    [
        ("h100-pcie5", 80, 2000, (50, 64), 756),
        ("h200", 141, 4800, (50, 64), 989),
        ("gh200", 96, 4000, (450, 450), 989),
        ("tpu-v5e", 16, 819, (15, 16), 197),
    ],
)
def test_figures_are_those_of_the_data_sheets(
    name: str, memory_gb: float, bandwidth_gb: float, up_gb: tuple[float, float], bf16_tflops: float
) -> None:
    machine = load_machine(name)
    assert machine.device_memory_bytes == memory_gb * 10**9
    assert machine.device_bandwidth_bytes_per_s == bandwidth_gb * 1e9
    assert up_gb[0] * 1e9 <= machine.link_up_bytes_per_s <= up_gb[1] * 1e9
    assert machine.matmul_flop_per_s["bfloat16"] == pytest.approx(bf16_tflops * 1e12, rel=1e-3)
    assert "bfloat16" in machine.matmul_dtypes


def test_network_figures_are_those_of_the_data_sheets() -> None:
    assert load_machine("h200").network_bytes_per_s == 450e9  # NVLink, 900 GB/s both ways
    assert load_machine("tpu-v5e").network_bytes_per_s == 1600e9 / 8  # 1600 Gbit/s
    assert load_machine("gh200").host_memory_bytes == 480 * 10**9


@pytest.mark.parametrize("name", NAMES)
def test_machine_is_complete_and_in_plausible_units(name: str) -> None:
    machine = load_machine(name)
    assert machine.name == name
    assert set(machine.matmul_flop_per_s) == {"float32", "bfloat16", "float16"}
    assert 10**9 <= machine.device_memory_bytes <= 10**12
    assert 10**9 <= machine.host_memory_bytes <= 10**13
    assert machine.host_memory_bytes < machine.disk_bytes
    for up in (machine.link_up_bytes_per_s, machine.link_down_bytes_per_s):
        assert up <= machine.link_both_bytes_per_s <= 2 * up
        assert up <= machine.device_bandwidth_bytes_per_s
    assert machine.disk_write_bytes_per_s <= machine.disk_read_bytes_per_s < machine.host_bandwidth_bytes_per_s
    assert 1e-7 < machine.launch_latency_s < 1e-4
    assert 1e-7 < machine.network_latency_s < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_a_source_or_says_that_it_is_a_choice(name: str) -> None:
    machine = load_machine(name)
    figures = {one.name for one in fields(Machine)} - {"name", "description", "matmul_dtypes", "notes"}
    assert set(machine.notes) == figures
    known = ("data sheet", "documentation", "product page", "our ", "blog", "NCCL", "IEEE", "How to Scale Your Model",
             "Optimization Guide")  # fmt: skip
    for key, note in machine.notes.items():
        assert any(word in note for word in known), (key, note)


def test_unknown_machine_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no machine is named 'H200'") as caught:
        load_machine("H200")
    assert str(caught.value).endswith(
        "(did you mean 'h200'?), the machines are gh200, h100-pcie5, h200, laptop, tpu-v5e"
    )


def test_incomplete_file_is_refused() -> None:
    content = content_of("laptop")
    del content["link_up_bytes_per_s"]
    content["link_upwards"] = {"value": 1, "note": "nobody"}
    with pytest.raises(ValueError, match="missing: link_up_bytes_per_s, unknown: link_upwards"):
        read_machine("laptop", content)


@pytest.mark.parametrize("entry", [{"value": 0, "note": "a data sheet"}, {"value": 5, "note": ""}])
def test_figure_without_value_or_source_is_refused(entry: dict[str, Any]) -> None:
    content = content_of("laptop") | {"disk_bytes": entry}
    with pytest.raises(ValueError, match="must give disk_bytes a positive value and a note"):
        read_machine("laptop", content)


def test_native_dtype_without_a_rate_is_refused() -> None:
    content = content_of("laptop") | {"matmul_dtypes": ["float8"]}
    with pytest.raises(ValueError, match="matmul_flop_per_s for each of its matmul_dtypes, got"):
        read_machine("laptop", content)
