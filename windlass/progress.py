"""What rank 0 shows of a run while it runs: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console

_LINES = 20  # in a whole run, where there is no terminal


class Progress(Protocol):
    """Shows each step as it ends; `close` leaves the output ready for other text."""

    def update(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Nothing:
    """What ranks other than 0 show."""

    def update(self, row: Mapping[str, Any]) -> None:
        return None

    def close(self) -> None:
        return None


class Bar:
    """A line that is redrawn: step, loss, speed, time left."""

    def __init__(self, console: Console, first_step: int, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=steps, completed=first_step, facts="starting")
        self._bar.start()

    def update(self, row: Mapping[str, Any]) -> None:
        self._bar.update(self._task, completed=row["step"], facts=f"loss {_loss(row)}  {_speed(row)}")

    def close(self) -> None:
        self._bar.stop()


class Lines:
    """A line for the first step, the last one and some between."""

    def __init__(self, first_step: int, steps: int) -> None:
        self._first, self._steps = first_step, steps
        self._every = max(1, steps // _LINES)
        self._start = time.monotonic()

    def update(self, row: Mapping[str, Any]) -> None:
        step = row["step"]
        if step % self._every and step not in (self._first + 1, self._steps):
            return
        spent = time.monotonic() - self._start
        left = spent / (step - self._first) * (self._steps - step)
        print(
            f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {_loss(row)}  lr {row['lr']:.2e}  "
            f"{_speed(row)}  {left:.0f} s left",
            flush=True,
        )

    def close(self) -> None:
        return None


def show_progress(rank: int, first_step: int, steps: int) -> Progress:
    """What suits this rank and where its output goes."""
    if rank != 0:
        return Nothing()
    from rich.console import Console

    console = Console()
    return Bar(console, first_step, steps) if console.is_terminal else Lines(first_step, steps)


def _loss(row: Mapping[str, Any]) -> str:
    return "not finite" if row["loss"] is None else f"{row['loss']:.3f}"


def _speed(row: Mapping[str, Any]) -> str:
    return f"{row['tokens_per_s']:,.0f} tokens/s"
