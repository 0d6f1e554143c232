"""Level 2: calls that do not match, wrong arguments, ranks that die or do not come. All are told, and nothing hangs."""

from __future__ import annotations

from pathlib import Path

import pytest

from windlass.accelerator.interface import Accelerator
from windlass.conformance import refusal_workers as workers
from windlass.conformance.collective_values import dtype_needs, require_dtype
from windlass.conformance.plugin import Run
from windlass.conformance.rank_pool import RanksFailed
from windlass.conformance.requirements import requires

_TIMEOUT_SECONDS = 30.0  # WINDLASS_TIMEOUT, where nobody should need it
_SHORT_SECONDS = 12.0  # where a test waits for it; opening a device has to fit in
_SOON_SECONDS = 3 * _SHORT_SECONDS  # on a machine that is busy
_LOADING_SECONDS = 18.0  # more, for a framework that new processes load side by side, each at its own pace


@pytest.fixture(autouse=True)
def _limit_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are given up after seconds, and not after ten minutes."""
    monkeypatch.setenv("WINDLASS_TIMEOUT", str(_TIMEOUT_SECONDS))


@pytest.fixture
def short_timeout(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> float:
    """The seconds after which ranks of this test are given up."""
    seconds = _SHORT_SECONDS + _LOADING_SECONDS * accelerator.capabilities.lazy
    monkeypatch.setenv("WINDLASS_TIMEOUT", str(seconds))
    return seconds


@requires(
    level=2,
    must="Calls that differ in kind, tag, size, dtype or splits raise CollectiveMismatch on every rank, none hangs.",
    needs="ranks:3",
)
@pytest.mark.parametrize("difference", workers.DIFFERENCES)
def test_mismatch(run: Run, difference: str) -> None:
    for rank, met in enumerate(run(workers.make_different_calls, 3, difference)):
        assert met.error == "CollectiveMismatch", f"rank {rank} met {met}"
        assert met.seconds < _SOON_SECONDS


@requires(
    level=2,
    must="Wrong sizes, shapes, strides, dtypes, splits, sources and operations raise ValueError at the call, unsent.",
    needs=lambda ranks: f"ranks:{ranks}",
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_wrong_arguments(run: Run, ranks: int) -> None:
    for results in run(workers.make_wrong_calls, ranks):
        assert len(results) > 15
        for name, rank, met, untouched in results:
            assert met.error == "ValueError", f"{name} on rank {rank}: met {met}"
            assert met.text, f"{name}: the error says nothing"
            assert untouched, f"{name} wrote to its output"


@requires(
    level=2,
    must="A reduction into a dtype that cannot hold its terms raises ValueError at the call.",
    needs=lambda source, target: dtype_needs(source, f"dtypes:{target}", "ranks:2"),
)
@pytest.mark.parametrize(
    ("source", "target"), [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float16")]
)
def test_narrowing_reduction(accelerator: Accelerator, run: Run, source: str, target: str) -> None:
    require_dtype(accelerator, source)
    require_dtype(accelerator, target)
    assert run(workers.narrow_a_reduction, 2, source, target)[0].error == "ValueError"


@requires(
    level=2,
    must="Groups without ranks, with a rank twice or outside the world, and calls by a rank outside raise ValueError.",
    needs="ranks:3",
)
def test_wrong_groups(run: Run) -> None:
    for rank, met in enumerate(run(workers.ask_for_wrong_groups, 3)):
        assert [one.error for one in met] == ["ValueError"] * (6 if rank else 4)


@requires(
    level=2,
    must="When a rank is killed, the others raise PeerLost, or CollectiveTimeout in time.",
    needs="ranks:3",
)
def test_killed_rank(run: Run, short_timeout: float) -> None:
    with pytest.raises(RanksFailed) as caught:
        run(workers.lose_rank, 3, short_timeout / 6, fresh=True)
    assert sorted(caught.value.results) == [0, 2], str(caught.value)
    for rank, met in caught.value.results.items():
        assert met.error in ("PeerLost", "CollectiveTimeout"), f"rank {rank} met {met}"
        assert "weights" in met.text or "1" in met.text, f"{met} names neither the collective nor the rank"


@requires(
    level=2,
    must="A rank that lives and does not enter a collective is given up after the timeout with CollectiveTimeout.",
    needs="ranks:2",
)
def test_late_rank(run: Run, tmp_path: Path, short_timeout: float) -> None:
    met, _ = run(workers.come_late, 2, str(tmp_path))
    assert met.error == "CollectiveTimeout", met
    assert "weights" in met.text
    assert 0.9 * short_timeout < met.seconds < 3 * short_timeout


@requires(
    level=2,
    must="When a rank of the job never comes, the others raise CollectiveTimeout.",
    needs="ranks:2",
)
def test_missing_rank(run: Run, short_timeout: float) -> None:
    met, _ = run(workers.stay_away, 2)
    assert met.error == "CollectiveTimeout", met
    assert met.seconds < 3 * short_timeout
