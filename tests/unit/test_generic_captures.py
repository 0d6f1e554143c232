"""Recorded functions: one recording for each list of tensors, same results and counts, and a way back."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.backends.generic.captures import KEPT, CapturedFunction


class PretendRecorder:
    """Records like a device: issuing computes nothing that stays, replaying writes where recorded addresses point."""

    def __init__(self, refusal: str = "") -> None:
        self.recorded = 0
        self.replayed = 0
        self.discarded = 0
        self.refusal = refusal
        self.watched: list[Tensor] = []  # what issuing may not change

    def record(self, issue: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Callable[[], None]]:
        before = [tensor.clone() for tensor in self.watched]
        results = issue()
        for tensor, value in zip(self.watched, before, strict=True):
            tensor.copy_(value)
        if self.refusal:
            raise RuntimeError(self.refusal)
        self.recorded += 1
        kept = [(tensor, tensor.clone()) for tensor in results if not any(tensor is one for one in self.watched)]

        def replay() -> None:
            self.replayed += 1
            again = issue()
            for (tensor, _), value in zip(kept, again[-len(kept) :] if kept else [], strict=True):
                tensor.copy_(value)

        return results, replay

    def discard(self) -> None:
        self.discarded += 1


def accumulate(counters: Counters) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """Add the second tensor to the first, in place; give it back with its first half, and its double."""

    def function(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        total, term = tensors
        counters.count_kernel("add", "made up")
        total.add_(term)
        return [total, total[: total.numel() // 2], total * 2]

    return function


def make(recorder: PretendRecorder, counters: Counters, told: list[str] | None = None) -> CapturedFunction:
    tell = (lambda failure: None) if told is None else told.append
    return CapturedFunction(accumulate(counters), recorder, counters, "gpu:0", tell)


def test_first_it_runs_then_it_is_recorded_then_replayed() -> None:
    counters, recorder = Counters(), PretendRecorder()
    captured = make(recorder, counters)
    total, term = torch.zeros(4), torch.ones(4)
    recorder.watched = [total, term]
    for number in range(1, 5):
        results = captured([total, term])
        assert results[0] is total
        assert total.tolist() == [float(number)] * 4
        assert results[1].tolist() == [float(number)] * 2
        assert results[1].data_ptr() == total.data_ptr()
        assert results[2].tolist() == [2.0 * number] * 4
    assert (recorder.recorded, recorder.replayed) == (1, 3)


def test_a_replay_counts_what_the_recording_counted() -> None:
    counters, recorder = Counters(), PretendRecorder()
    total, term = torch.zeros(4), torch.ones(4)
    recorder.watched = [total, term]
    seen: list[int] = []

    def function(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if not recorder.recorded:  # Python runs when it is recorded and not when it is replayed
            counters.count_kernel("add", "made up")
            counters.count_copy("device", "x", 8)
        tensors[0].add_(tensors[1])
        return [tensors[0]]

    captured = CapturedFunction(function, recorder, counters, "gpu:0")
    for _ in range(4):
        captured([total, term])
        seen.append(counters.kernels["add", "made up"].calls)
    assert seen == [1, 2, 3, 4]
    assert (counters.copies["device", "x"].calls, counters.copies["device", "x"].bytes) == (4, 32)


def test_other_tensors_make_another_recording_and_old_ones_go() -> None:
    counters, recorder = Counters(), PretendRecorder()
    captured = make(recorder, counters)
    pairs = [(torch.zeros(4), torch.ones(4)) for _ in range(KEPT + 1)]
    for pair in pairs:
        recorder.watched = list(pair)
        captured(pair)
        captured(pair)
    assert recorder.recorded == KEPT + 1
    assert recorder.discarded == 1
    recorder.watched = list(pairs[0])
    captured(pairs[0])  # its recording is the one that went: it runs, and everything starts again
    assert recorder.recorded == KEPT + 1
    assert pairs[0][0].tolist() == [3.0] * 4


def test_another_layout_at_the_same_address_is_another_call() -> None:
    counters, recorder = Counters(), PretendRecorder()
    captured = make(recorder, counters)
    total, term = torch.zeros(4), torch.ones(4)
    recorder.watched = [total, term]
    for _ in range(2):
        captured([total, term])
    captured([total[:2], term[:2]])
    assert total.tolist() == [3.0, 3.0, 2.0, 2.0]


def test_tensors_that_change_with_every_call_are_never_recorded_and_never_waited_for() -> None:
    counters, recorder = Counters(), PretendRecorder()
    captured = make(recorder, counters)
    kept = [(torch.zeros(4), torch.ones(4)) for _ in range(3 * KEPT)]
    for pair in kept:
        captured(pair)
    assert (recorder.recorded, recorder.discarded) == (0, 0)


def test_a_recording_keeps_nothing_of_the_caller_alive() -> None:
    counters, recorder = Counters(), PretendRecorder()

    def function(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [tensors[0], tensors[0][1:3], tensors[0] + 1]

    class Forgetful(PretendRecorder):
        def record(self, issue: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Callable[[], None]]:
            return issue(), lambda: None

    captured = CapturedFunction(function, Forgetful(), counters, "gpu:0")
    del recorder
    base = torch.arange(8.0)
    tensor = base[2:6]
    for _ in range(3):
        results = captured([tensor])
    assert results[1].tolist() == [3.0, 4.0]
    storage = weakref.ref(base.untyped_storage())
    del base, tensor, results
    gc.collect()
    assert storage() is None


def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once() -> None:
    counters, told = Counters(), list[str]()
    recorder = PretendRecorder("operation not permitted when stream is capturing\nmore")
    captured = make(recorder, counters, told)
    total, term = torch.zeros(4), torch.ones(4)
    recorder.watched = [total, term]
    captured([total, term])
    with pytest.warns(RuntimeWarning, match=r"^gpu:0 cannot record function \(operation not permitted when stream is "):
        captured([total, term])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        captured([total, term])
    assert total.tolist() == [3.0] * 4
    assert counters.kernels["add", "made up"].calls == 3
    assert told == [captured.failure] == ["operation not permitted when stream is capturing"]
