"""The grid of level 3: one model at every stage and accumulation, trained in one call per number of ranks.

Tests look at one cell each. Where the call for the whole grid fails, a cell that is asked for is trained alone, so that
a backend on which stage 3 fails is told so and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from windlass.conformance.rank_pool import RanksFailed
from windlass.conformance.training_workers import train_cells

Run = Callable[..., list[Any]]  # the fixture `run`
Cell = list[dict[str, Any]]  # by rank: what train_cells says about one stage and accumulation

STEPS = 6
STAGES = (0, 1, 2, 3)
ACCUMULATIONS = (1, 4)

_GRID_SECONDS, _CELL_SECONDS = 90.0, 45.0  # together less than the limit of a test that starts ranks
_Key = tuple[str, int, tuple[int, ...], tuple[int, ...]]
_answers: dict[_Key, list[dict[tuple[int, int], dict[str, Any]]] | RanksFailed] = {}


def trained_cell(
    run: Run, ranks: int, stage: int, accumulation: int, model: str = "Network", of: tuple[int, ...] = ACCUMULATIONS
) -> Cell:
    """One cell of the grid of `model` over all stages and the accumulations in `of`, trained once per process.

    Raises `RanksFailed` if the grid and then the cell alone failed.
    """
    for stages, accumulations, timeout in (
        (STAGES, of, _GRID_SECONDS),
        ((stage,), (accumulation,), _CELL_SECONDS),
    ):
        answer = _train_once(run, (model, ranks, stages, accumulations), timeout)
        if not isinstance(answer, RanksFailed):
            return [one[stage, accumulation] for one in answer]
    assert isinstance(answer, RanksFailed)
    raise answer


def _train_once(run: Run, key: _Key, timeout: float) -> list[dict[tuple[int, int], dict[str, Any]]] | RanksFailed:
    if key not in _answers:
        model, ranks, stages, accumulations = key
        try:
            _answers[key] = run(train_cells, ranks, model, list(stages), list(accumulations), STEPS, timeout=timeout)
        except RanksFailed as failure:
            _answers[key] = failure
    return _answers[key]
