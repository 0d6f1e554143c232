"""AdamW of many vectors at once: each as if it were alone, and nothing copied from the second time on."""

from __future__ import annotations

import itertools
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from windlass.accelerator.reference.adamw import Part
from windlass.backends.triton import adamw_many as adamw_many_module
from windlass.backends.triton.adamw import BLOCK, adamw
from windlass.backends.triton.adamw_many import adamw_many, find_table, make_table
from windlass.conformance.kernel_cases import (
    DTYPES,
    KEEP,
    ONE,
    SKIP,
    AdamwState,
    adamw_rounded_stepwise,
    equal_bits,
    make_scalars,
    make_state,
)

SCALARS = torch.stack([make_scalars(2, weight_decay=0.1), make_scalars(7, lr=3e-4, weight_decay=0.0)])
SCALE = torch.tensor(0.7)
LOWS = (None, torch.bfloat16, torch.float16)


def as_part(state: AdamwState) -> Part:
    return state.weight, state.gradient, state.exp_avg, state.exp_avg_sq, state.low


def make_states(counts: list[int]) -> list[AdamwState]:
    """Vectors of every combination of dtypes, in turn."""
    kinds = [(gradient, low) for gradient in DTYPES for low in LOWS]
    return [make_state(count, *kinds[index % len(kinds)], seed=index) for index, count in enumerate(counts)]


def assert_updated(found: AdamwState, before: AdamwState, row: int, *, decoupled: bool) -> None:
    wanted = adamw_rounded_stepwise(before, SCALARS[row], SCALE, decoupled=decoupled)
    assert all(map(equal_bits, (found.weight, found.exp_avg, found.exp_avg_sq), wanted))
    assert found.low is None or equal_bits(found.low, wanted[0].to(found.low.dtype))


@pytest.mark.parametrize("decoupled", [True, False])
def test_parts_of_every_kind_and_length(decoupled: bool) -> None:
    counts = [0, 1, 31, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, 0, 7, 2 * BLOCK, 100, 5, 0, 64, 1000, 3, 2, 1, 90]
    states = make_states(counts)
    before = [state.copy() for state in states]
    rows = [index % 2 for index in range(len(states))]
    results = adamw_many([as_part(state) for state in states], SCALARS, rows, SCALE, KEEP, decoupled=decoupled)
    for result, state, old, row in zip(results, states, before, rows, strict=True):
        given = (state.weight, state.exp_avg, state.exp_avg_sq, state.low)
        assert all(one is other for one, other in zip(result, given, strict=True))
        assert_updated(state, old, row, decoupled=decoupled)


def test_slices_of_one_vector_at_any_start() -> None:
    """Every element belongs to one part; parts are neither aligned nor in order."""
    count = 4 * BLOCK + 37
    whole = make_state(count, torch.bfloat16)
    alone = whole.copy()
    cuts = [0, 1, 3, 8, 40, BLOCK, BLOCK + 1, 2 * BLOCK + 50, count]
    parts = [as_part(whole.slice(begin, end)) for begin, end in itertools.pairwise(cuts)]
    random.Random(0).shuffle(parts)
    adamw_many(parts, SCALARS, [0] * len(parts), SCALE, KEEP)
    alone.update(adamw, SCALARS[0], SCALE)
    assert whole.bits() == alone.bits()


def test_many_parts() -> None:
    states = [make_state(1 + index % 5, torch.bfloat16, seed=index) for index in range(90)]
    before = [state.copy() for state in states]
    adamw_many([as_part(state) for state in states], SCALARS, [1] * 90, SCALE, KEEP)
    for state, old in zip(states, before, strict=True):
        assert_updated(state, old, 1, decoupled=True)


def test_what_may_not_be_kept_changes_nothing() -> None:
    states = make_states([5, BLOCK + 3, 17])
    states[1].gradient[0] = math.inf
    before = [state.copy() for state in states]
    adamw_many([as_part(state) for state in states], SCALARS, [0, 1, 0], torch.tensor(math.nan), SKIP)
    assert [state.bits() for state in states] == [state.bits() for state in before]


def test_no_parts() -> None:
    assert adamw_many([], SCALARS, [], SCALE, KEEP) == []
    empty = as_part(make_state(0))
    assert adamw_many([empty], SCALARS, [0], SCALE, KEEP)[0][0] is empty[0]


def test_tables_are_made_once() -> None:
    """A table is found again while its tensors stay where they are; numbers and rows of numbers may change."""
    states = make_states([50] * 9)
    parts = [as_part(state) for state in states]
    make_table.cache_clear()
    for scale in (1.0, 0.5, 0.25):
        adamw_many(parts, SCALARS * scale, [0] * 9, torch.tensor(scale), KEEP)
    assert make_table.cache_info().misses == 9  # a launch for each kind
    assert make_table.cache_info().hits == 18
    other = [as_part(state.copy()) for state in states]
    adamw_many(other, SCALARS, [0] * 9, ONE, KEEP)
    adamw_many(parts, SCALARS, [1] * 9, ONE, KEEP)
    assert make_table.cache_info().misses == 27


def test_alignment_is_that_of_the_worst_address() -> None:
    state = make_state(64, torch.bfloat16)
    base = [each.data_ptr() % 16 for each in (state.weight, state.gradient)]
    assert base == [0, 0]
    address = state.weight.data_ptr()
    entry = (address, address, address, address, 0, 64, 0)
    assert make_table(torch.device("cpu"), (entry, entry)).aligned
    assert not make_table(torch.device("cpu"), (entry, (address, address + 8, address, address, 0, 64, 0))).aligned


def test_what_does_not_fit_is_refused() -> None:
    part = as_part(make_state(4))
    with pytest.raises(ValueError, match=r"^kernel 'adamw_many' got 2 rows for 1 parts, wanted one for each; "):
        adamw_many([part], SCALARS, [0, 1], ONE, KEEP)
    for row in (-1, 2):
        with pytest.raises(ValueError, match=rf"^kernel 'adamw_many' got row {row} for a part, wanted 0 to 1; "):
            adamw_many([part], SCALARS, [row], ONE, KEEP)
    with pytest.raises(ValueError, match=r"^kernel 'adamw_many' got scalars as contiguous float32\[9\], wanted"):
        adamw_many([part], make_scalars(1), [0], ONE, KEEP)
    with pytest.raises(ValueError, match=r"^kernel 'adamw_many' got gradient as contiguous float32\[5\], wanted"):
        adamw_many([(part[0], torch.zeros(5), *part[2:])], SCALARS, [0], ONE, KEEP)
    with pytest.raises(ValueError, match=r"^kernel 'adamw_many' got a vector on cpu, wanted meta, where scalars are; "):
        adamw_many([part], torch.stack([make_scalars(1)]).to("meta"), [0], ONE, KEEP)


def test_a_graph_may_use_known_tables_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that is recorded would be made again whenever the graph runs, from memory long given back."""
    device, address = torch.device("cpu"), make_state(4).weight.data_ptr()
    known, new = ((address + 16 * index, address, address, address, 0, 4, 0) for index in range(2))
    table = make_table(device, (known,))
    monkeypatch.setattr(adamw_many_module, "_is_recording", lambda device: True)
    assert make_table(device, (known,)) is table
    with pytest.raises(RuntimeError, match=r"^kernel 'adamw_many' got tensors for the first time while a graph is rec"):
        make_table(device, (new,))


class _Stream:
    """Notes what it is ordered after."""

    def __init__(self) -> None:
        self.waited_for: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waited_for.append(event)


class _Event:
    def __init__(self) -> None:
        self.reached = False

    def query(self) -> bool:
        return self.reached


class _Lent:
    """A table's memory, which notes the streams that use it."""

    def __init__(self) -> None:
        self.users: list[object] = []

    def record_stream(self, stream: object) -> None:
        self.users.append(stream)


def test_a_table_is_used_after_it_was_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stream comes first waits for the copy; once that is over, nobody asks again."""
    made_on, other, copied = _Stream(), _Stream(), _Event()
    entries, block_parts = _Lent(), _Lent()
    table: Any = SimpleNamespace(entries=entries, block_parts=block_parts, stream=made_on, copied=copied)
    current = made_on
    monkeypatch.setattr(adamw_many_module, "make_table", lambda device, entries: table)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: current)
    device = torch.device("meta")
    assert find_table(device, ()) is table
    assert (made_on.waited_for, entries.users) == ([copied], [])
    current = other
    find_table(device, ())
    assert other.waited_for == [copied]
    assert entries.users == block_parts.users == [other]
    copied.reached = True
    find_table(device, ())
    assert table.copied is None
    assert other.waited_for == [copied]
