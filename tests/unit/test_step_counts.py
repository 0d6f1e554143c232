"""Counts of updates that only the device knows: cohorts divide, skipped steps do not count, loaded counts go on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from windlass.accelerator.interface import Accelerator
from windlass.backends.cpu.device import open_cpu
from windlass.core.step_counts import DeviceStepCounts, HostStepCounts, StepCounts

NAMES = ("a", "b", "c")
STEPS = [({"a", "b", "c"}, True), ({"a"}, True), ({"a", "b"}, False), ({"b", "c"}, True), ({"a", "b", "c"}, True)]


@pytest.fixture(scope="module")
def accelerator() -> Iterator[Accelerator]:
    opened = open_cpu()
    yield opened
    opened.close()


def on_device(accelerator: Accelerator) -> DeviceStepCounts:
    return DeviceStepCounts(NAMES, accelerator)


def test_both_kinds_count_alike(accelerator: Accelerator) -> None:
    host, device = HostStepCounts(NAMES), on_device(accelerator)
    for names, keep in STEPS:
        host.advance(names, keep)
        device.advance(names, torch.tensor(keep))
        assert dict(device) == dict(host)
    assert dict(host) == {"a": 3, "b": 3, "c": 3}


def test_parameters_of_one_history_share_a_cohort(accelerator: Accelerator) -> None:
    counts = on_device(accelerator)
    counts.advance({"a", "c"}, torch.tensor(True))
    assert counts.cohort("a") == counts.cohort("c") != counts.cohort("b")
    next_count = counts.next_count(counts.cohort("a"))
    assert isinstance(next_count, torch.Tensor)
    assert float(next_count) == 2.0


def load(counts: StepCounts, values: dict[str, int]) -> None:
    for name, value in values.items():
        counts[name] = value


def test_counts_that_were_loaded_go_on_from_there(accelerator: Accelerator) -> None:
    counts, first, second = on_device(accelerator), {"a": 5, "b": 7, "c": 5}, {"a": 2, "b": 2, "c": 9}
    for values in (first, second, first):
        load(counts, values)
        assert dict(counts) == values
    assert counts.cohort("a") == counts.cohort("c")
    counts.advance({"a", "b"}, torch.tensor(True))
    assert dict(counts) == {"a": 6, "b": 8, "c": 5}
    load(counts, first)
    assert dict(counts) == first


def test_unknown_names_are_refused(accelerator: Accelerator) -> None:
    counts = on_device(accelerator)
    with pytest.raises(KeyError):
        counts["d"] = 1
    with pytest.raises(TypeError, match="cannot be deleted"):
        del counts["a"]
