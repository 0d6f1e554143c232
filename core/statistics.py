"""The step's statistics: norm, finite check, loss, wish to stop, gathered from all ranks in one small vector.

[Note: who decides] Where ranks may run different programs, the vector also carries which parameters were touched and
which units have late gradients, and the host reads it before the update: one read per step. Where all ranks run the
same program, these facts are the same everywhere and known beforehand; the vector carries a digest of what was touched
and of how many backward passes that took, a difference between ranks keeps every weight as it was, and the host reads
the outcome only when somebody asks. Gradients that are late on one rank only are noticed by the collectives themselves.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator, Group
from windlass.core.planner import STATISTICS
from windlass.core.scalars import LastSent, send_scalar

_DIGEST_BITS = 24  # what a float32 holds exactly


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did, the same on every rank."""

    updated: bool  # False: nothing changed, since a gradient was not finite or there was none
    finite: bool
    norm: float  # of the mean gradient, before clipping; nan if skipped
    loss: float  # mean over ranks of what they reported
    stop: bool  # some rank wants to stop
    skipped: int  # steps that were not finite, since the executor was made
    problem: str = ""  # the ranks' programs were found to differ: what to tell the user
    differed: int = 0  # steps in which they did that no outcome before this one has told of; they changed nothing


class Outcome:
    """What a step did: known, or on the device until somebody asks."""

    def __init__(self, find: Callable[[], StepReport], *, touched: bool) -> None:
        """`find` is called once at most; `touched`: some parameter had a gradient."""
        self.touched = touched
        self.told = False  # somebody has been told of the problem that it reports
        self._find = find
        self._report: StepReport | None = None

    @property
    def known(self) -> bool:
        """True if reading costs nothing."""
        return self._report is not None

    def read(self) -> StepReport:
        """Read it, with one host read unless it is known."""
        if self._report is None:
            self._report = self._find()
        return self._report


@dataclass(frozen=True)
class LocalFacts:
    """What this rank brings to the statistics."""

    squares: Sequence[Tensor]  # per region: [2] fp32, of the unscaled mean gradient
    loss: Tensor | None
    stop: bool
    late: Sequence[bool]  # per unit of the plan
    touched: Iterable[str]  # names
    passes: int  # backward passes since the last update


@dataclass(frozen=True)
class Verdict:
    """What the update needs, on the device."""

    factor: Tensor  # [] fp32: the clip factor
    keep: Tensor  # [] bool
    norm: Tensor  # [] fp32


@dataclass(frozen=True)
class HostStatistics:
    """What the host has read before the update."""

    norm: float
    finite: bool
    loss: float
    stop: bool
    late: list[bool]  # per unit: some rank has gradients that missed their unit's reduction
    touched: set[str]  # parameters with a gradient on some rank


class StatisticsExchange:
    """Gathers the statistics of all ranks of a group; `names` are the trainable parameters."""

    def __init__(self, accelerator: Accelerator, group: Group, names: Sequence[str]) -> None:
        self._accelerator = accelerator
        self._group = group
        self._names = list(names)
        self._flags = LastSent(accelerator)
        self._steps = 0
        self._skipped = send_scalar(0.0, accelerator.device)
        self._differed = send_scalar(0.0, accelerator.device)
        self._differed_before = 0.0  # of them, as of the last outcome that was read

    def read(self, facts: LocalFacts, clip: float, tag: str) -> tuple[Verdict, HostStatistics]:
        """Exchange what ranks that run different programs must tell each other. One host read, under `tag`."""
        touched = set(facts.touched)
        flags = [float(facts.stop), *map(float, facts.late), *(float(name in touched) for name in self._names)]
        total = self._gather(facts, flags).sum(0)
        verdict = _judge(total, clip)
        vector = torch.cat([torch.stack([verdict.norm, verdict.keep.to(torch.float32)]), total[2:]])
        read = self._accelerator.read_host(vector, tag=tag)
        finite, first, units = bool(read[1]), STATISTICS, len(facts.late)
        statistics = HostStatistics(
            norm=read[0] if finite else math.nan,
            finite=finite,
            loss=read[2] / self._group.size,
            stop=read[3] > 0,
            late=[value > 0 for value in read[first : first + units]],
            touched={name for name, value in zip(self._names, read[first + units :], strict=True) if value > 0},
        )
        return verdict, statistics

    def exchange(self, facts: LocalFacts, clip: float) -> tuple[Verdict, Outcome]:
        """Exchange what ranks of one program must: nothing is read on the host until the outcome is asked for.

        The outcome tells of a problem if the ranks' steps were not made of the same parts, this one or one before that
        nobody has read; no rank has changed anything in those.
        """
        touched = sorted(facts.touched)
        made_of = zlib.crc32(repr((touched, facts.passes)).encode()) % (1 << _DIGEST_BITS)
        rows = self._gather(facts, [float(facts.stop), float(made_of)])
        total, digests = rows.sum(0), rows[:, STATISTICS]
        judged = _judge(total, clip)
        agree = digests.max() == digests.min()
        verdict = Verdict(judged.factor, torch.logical_and(judged.keep, agree), judged.norm)
        kept, agreed = judged.keep.to(torch.float32), agree.to(torch.float32)
        if touched:
            self._skipped = self._skipped + agreed - verdict.keep.to(torch.float32)
        self._differed = self._differed + 1 - agreed
        vector = torch.stack((judged.norm, kept, total[2], total[3], agreed, self._skipped, self._differed))
        self._steps += 1
        step = self._steps

        def find() -> StepReport:
            norm, finite, loss, stop, same, skipped, differed = self._accelerator.read_host(vector, tag="outcome")
            unread, self._differed_before = differed - self._differed_before, max(differed, self._differed_before)
            return StepReport(
                updated=bool(finite and same and touched),
                finite=bool(finite),
                norm=norm if finite else math.nan,
                loss=loss / self._group.size,
                stop=stop > 0,
                skipped=int(skipped),
                problem=_describe_difference(step, int(unread)) if unread > 0 else "",
                differed=max(int(unread), 0),
            )

        return verdict, Outcome(find, touched=bool(touched))

    def _gather(self, facts: LocalFacts, flags: list[float]) -> Tensor:
        """[ranks, 3 + flags]: squares, finite check and loss, then the flags, of every rank."""
        device, size = self._accelerator.device, self._group.size
        zeros = torch.zeros(2, dtype=torch.float32, device=device)
        mine = torch.cat(
            [
                torch.stack(list(facts.squares)).sum(0) if facts.squares else zeros,
                zeros[:1] if facts.loss is None else facts.loss.reshape(1),
                self._flags.send(flags),
            ]
        )
        everyone = torch.empty(size * mine.numel(), dtype=torch.float32, device=device)
        self._accelerator.collectives.all_gather(everyone, mine, self._group, tag="statistics").wait()
        return everyone.view(size, -1)


def _describe_difference(step: int, count: int) -> str:
    where = f"optimizer step {step}" if count == 1 else f"{count} optimizer steps up to step {step}"
    return (
        f"the ranks ran different programs in {where} of this engine: their gradients reached different parameters, or "
        "in another number of backward passes, which this device cannot follow, and no weight was changed; let every "
        "rank use the same modules in every step"
    )


def _judge(total: Tensor, clip: float) -> Verdict:
    """From the summed statistics: the norm, whether all is finite, and the factor that clips to `clip` (0: none)."""
    norm = total[0].sqrt()
    keep = torch.logical_and(total[1] == 0, torch.isfinite(norm))
    factor = torch.clamp(clip / (norm + 1e-6), max=1.0) if clip > 0 else torch.ones_like(norm)
    return Verdict(factor, keep, norm)
