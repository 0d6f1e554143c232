"""Measured rates: those of a simulated machine are the machine's own figures, and the stopwatch counts right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from windlass.accelerator.interface import Accelerator, Place
from windlass.backends.sim.device import open_sim
from windlass.backends.sim.machines import Machine, load_machine
from windlass.backends.sim.settings import SimSettings
from windlass.rates import (
    DIRECTIONS,
    Direction,
    measure_copy,
    measure_link,
    measure_matmul,
    measure_rates,
    measure_seconds,
)

BYTES = 2**16


@pytest.fixture(scope="module")
def machine() -> Machine:
    return load_machine("h200")


@pytest.fixture(scope="module")
def device() -> Iterator[Accelerator]:
    accelerator = open_sim(settings=SimSettings(machine="h200", delay_ms=0.0))
    yield accelerator
    accelerator.close()


def test_copies_within_a_place_take_what_the_memory_takes(device: Accelerator, machine: Machine) -> None:
    assert measure_copy(device, BYTES) == pytest.approx(machine.device_bandwidth_bytes_per_s, rel=1e-6)
    assert measure_copy(device, BYTES, Place.HOST) == pytest.approx(machine.host_bandwidth_bytes_per_s, rel=1e-6)


def test_links_have_the_rates_of_the_machine(device: Accelerator, machine: Machine) -> None:
    up, down, both = (measure_link(device, direction, BYTES) for direction in DIRECTIONS)
    assert up == pytest.approx(machine.link_up_bytes_per_s, rel=1e-6)
    assert down == pytest.approx(machine.link_down_bytes_per_s, rel=1e-6)
    assert both == pytest.approx(machine.link_both_bytes_per_s, rel=1e-6)


def test_a_product_takes_its_operations_and_one_launch(device: Accelerator, machine: Machine) -> None:
    rows = 192
    seconds = 2 * rows**3 / machine.matmul_flop_per_s["bfloat16"]
    moved = 3 * 2 * rows**2 / machine.device_bandwidth_bytes_per_s
    wanted = 2 * rows**3 / (max(seconds, moved) + machine.launch_latency_s)
    assert measure_matmul(device, "bfloat16", rows) == pytest.approx(wanted, rel=0.01)


def test_what_was_allocated_is_given_back(device: Accelerator) -> None:
    def used() -> list[int | None]:
        return [device.memory.stats(place).used.value for place in (Place.DEVICE, Place.HOST)]

    before = used()
    measure_copy(device, BYTES)
    for direction in DIRECTIONS:
        measure_link(device, direction, BYTES)
    assert used() == before


def test_all_rates_are_plain_data_by_size(device: Accelerator, machine: Machine) -> None:
    rates = measure_rates(device, copy_bytes=(BYTES // 2, BYTES), link_bytes=(BYTES,), matmul_rows=(64, 32))
    assert rates.accelerator == "sim:0"
    assert list(rates.device_copy) == [BYTES // 2, BYTES]
    assert set(rates.matmul) == set(device.capabilities.matmul_dtypes)
    assert rates.best_copy == pytest.approx(machine.device_bandwidth_bytes_per_s, rel=1e-6)
    assert rates.best_matmul("bfloat16") == rates.matmul["bfloat16"][64] > rates.matmul["bfloat16"][32]
    written = json.loads(json.dumps(rates.to_json()))
    assert written["up"] == {str(BYTES): rates.up[BYTES]}
    with pytest.raises(ValueError, match="no matrix product in float8 was measured on sim:0, only in"):
        rates.best_matmul("float8")


class Watch:
    """A device whose clock shows what actions added to it."""

    def __init__(self, ticks: Callable[[int], float]) -> None:
        self.now, self.calls, self.ticks = 0.0, 0, ticks
        self.accelerator = cast(Accelerator, SimpleNamespace(name="watch:0", clock=lambda: self.now))

    def action(self) -> None:
        self.calls += 1
        self.now += self.ticks(self.calls)


def test_a_slow_first_call_does_not_count() -> None:
    watch = Watch(lambda call: 100.0 if call == 1 else 0.5)
    assert measure_seconds(watch.accelerator, watch.action) == 0.5
    assert watch.calls == 2 + 5


def test_the_median_is_taken() -> None:
    watch = Watch(lambda call: 50.0 if call in (4, 7) else 1.0)
    assert measure_seconds(watch.accelerator, watch.action, repeats=5) == 1.0


def test_quick_calls_are_repeated_until_the_clock_sees_them() -> None:
    watch = Watch(lambda _: 2.0**-10)
    seconds = measure_seconds(watch.accelerator, watch.action, shortest=2.0**-6, repeats=3, patience=60.0)
    assert seconds == 2.0**-10
    assert watch.calls == 2 + 1 + 4 + 3 * 16


def test_a_clock_that_stands_still_is_told() -> None:
    watch = Watch(lambda _: 0.0)
    with pytest.raises(RuntimeError, match=r"the clock of watch:0 gives no time for \d+ calls"):
        measure_seconds(watch.accelerator, watch.action)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_only_the_copies_that_are_asked_for_are_made(device: Accelerator, direction: Direction) -> None:
    device.counters.reset()
    measure_link(device, direction, BYTES)
    assert {kind for kind, _ in device.counters.copies} == ({"up", "down"} if direction == "both" else {direction})
