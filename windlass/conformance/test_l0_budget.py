"""Level 0: running out of memory, which a budget makes testable anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from windlass.accelerator.errors import OutOfMemory
from windlass.accelerator.interface import Accelerator, Memory
from windlass.conformance.allocations import assert_holds, used
from windlass.conformance.requirements import requires


@pytest.fixture
def memory(accelerator: Accelerator) -> Iterator[Memory]:
    """The memory facet, without a budget again after the test."""
    yield accelerator.memory
    accelerator.memory.set_budget(None)


@requires(level=0, must="A budget allows its last byte and refuses the next one with OutOfMemory.")
@pytest.mark.parametrize("limit", [1, 1000, 2**20 + 3])
def test_budget_is_exact(accelerator: Accelerator, memory: Memory, limit: int) -> None:
    memory.set_budget(used(accelerator) + limit)
    with pytest.raises(OutOfMemory):
        memory.empty((limit + 1,), torch.uint8)
    whole = memory.empty((limit,), torch.uint8)
    with pytest.raises(OutOfMemory):
        memory.empty((1,), torch.uint8)
    memory.release(whole)
    half = memory.empty((limit // 2,), torch.uint8)
    with pytest.raises(OutOfMemory):
        memory.empty((limit - limit // 2 + 1,), torch.uint8)
    rest = memory.empty((limit - limit // 2,), torch.uint8)
    memory.release(half)
    memory.release(rest)


@requires(level=0, must="A budget counts bytes, not elements.")
def test_budget_counts_bytes(accelerator: Accelerator, memory: Memory) -> None:
    memory.set_budget(used(accelerator) + 4 * 100)
    with pytest.raises(OutOfMemory):
        memory.empty((101,), torch.float32)
    with pytest.raises(OutOfMemory):
        memory.empty((51,), torch.int64)
    memory.release(memory.empty((100,), torch.float32))
    memory.release(memory.empty((5, 10), torch.int64))


@requires(level=0, must="A budget counts what was allocated before it was set, and harms nothing of it.")
def test_budget_below_what_is_used(accelerator: Accelerator, memory: Memory) -> None:
    tensor = memory.empty((1000,), torch.float32)
    tensor.copy_(torch.arange(1000.0))
    memory.set_budget(used(accelerator) - 2000)
    with pytest.raises(OutOfMemory):
        memory.empty((1,), torch.uint8)
    assert_holds(accelerator, tensor, torch.arange(1000.0))
    memory.release(tensor)
    memory.release(memory.empty((500,), torch.float32))  # exactly the 2000 bytes that were left of the 4000
    small = memory.empty((500,), torch.uint8)
    memory.set_budget(0)
    with pytest.raises(OutOfMemory):
        memory.empty((1,), torch.uint8)
    memory.release(small)


@requires(level=0, must="A budget can be raised, and None takes it away.")
def test_budget_is_lifted(accelerator: Accelerator, memory: Memory) -> None:
    before = used(accelerator)
    for limit in (before + 10, before + 20):
        memory.set_budget(limit)
        with pytest.raises(OutOfMemory):
            memory.empty((21,), torch.uint8)
    memory.release(memory.empty((20,), torch.uint8))
    memory.set_budget(None)
    memory.release(memory.empty((21,), torch.uint8))


@requires(level=0, must="An allocation that is refused leaves the accounts as they were.")
def test_refusal_changes_no_account(accelerator: Accelerator, memory: Memory) -> None:
    kept = memory.empty((100,), torch.uint8, tag="conformance kept")
    memory.set_budget(used(accelerator) + 100)
    memory.reset_peak()
    before = memory.stats()
    with pytest.raises(OutOfMemory):
        memory.empty((101,), torch.uint8, tag="conformance refused")
    after = memory.stats()
    assert (after.used, after.peak) == (before.used, before.peak)
    assert after.by_tag.get("conformance refused", 0) == 0
    assert after.by_tag["conformance kept"] == 100
    memory.release(kept)


@requires(level=0, must="OutOfMemory names the tag of the allocation, what was asked and what is free.")
def test_message(accelerator: Accelerator, memory: Memory) -> None:
    memory.set_budget(used(accelerator) + 2**20)
    with pytest.raises(OutOfMemory) as caught:
        memory.empty((2**20,), torch.float32, tag="the states of the optimizer")
    text = str(caught.value).replace(accelerator.name, "")
    assert "the states of the optimizer" in text
    assert len(re.findall(r"\d+(?:\.\d+)?", text)) >= 2, f"what was asked and what is free: {text}"


@requires(level=0, must="More than the device has raises OutOfMemory when it is asked for, not later.")
def test_device_is_exhausted(accelerator: Accelerator, memory: Memory) -> None:
    before = used(accelerator)
    with pytest.raises(OutOfMemory):
        memory.empty((2**50,), torch.uint8, tag="everything")
    assert used(accelerator) == before
    tensor = memory.empty((1000,), torch.uint8)  # the control: the device still works
    tensor.copy_(torch.full((1000,), 7, dtype=torch.uint8))
    assert_holds(accelerator, tensor, torch.full((1000,), 7, dtype=torch.uint8))
    memory.release(tensor)
