"""At every boundary the ranks compare the programs that they have run, and all of them raise where two differ.

[Note: on every lane]
A rank that has made one collective more may be waiting for it while the others have come to the boundary. So they meet
there on every lane: on that rank's lane the boundary meets the odd collective, and both sides get the mismatch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from windlass.accelerator.errors import WindlassError
from windlass.accelerator.interface import Group
from windlass.backends.cpu.collectives import CpuCollectives
from windlass.backends.sim.conductor import Conductor
from windlass.backends.sim.errors import ProgramMismatch, name_calls
from windlass.backends.sim.program import Program, digest
from windlass.backends.sim.watcher import unwatched
from windlass.backends.sim.works import SimWork

_SHOWN: Final = 160  # characters of an operation, in messages
_BEFORE: Final = 40  # of them before the first difference


class Agreement:
    """Compares the programs of all ranks of the job."""

    def __init__(
        self, wire: CpuCollectives, lanes: Mapping[str, Group], conductor: Conductor, program: Program
    ) -> None:
        self._wire = wire
        self._lanes = lanes  # the group on which each lane's thread meets its peers
        self._conductor = conductor
        self._program = program

    def require(self) -> None:
        """Raise ProgramMismatch on every rank unless all have run the same program since the boundary before. A rank
        that waits for a collective instead makes it a CollectiveMismatch. A collective of all ranks."""
        digests = self._exchange_digests(digest(self._program.last))
        if len(set(digests)) > 1:
            raise ProgramMismatch(describe_difference(self._exchange_programs()))

    def _exchange_digests(self, mine: bytes) -> list[bytes]:
        with unwatched(), torch.inference_mode(False):
            sent = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
            received = {lane: _empty(len(mine) * group.size, torch.uint8) for lane, group in self._lanes.items()}
        works = [self._meet(lane, sent, output) for lane, output in received.items()]
        self._conductor.block_until_failed(frozenset(works))
        with unwatched():
            rows = next(iter(received.values())).view(-1, len(mine)).tolist()
        return [bytes(row) for row in rows]

    def _meet(self, lane: str, sent: Tensor, output: Tensor) -> SimWork:
        def act() -> None:
            try:
                self._wire.all_gather(output, sent, self._lanes[lane], tag="boundary").wait()
            except WindlassError as error:
                raise type(error)(name_calls(str(error))) from error

        return self._conductor.issue(lane, act, reads=(), writes=(), what="the boundary", seconds=0.0, in_order=True)

    def _exchange_programs(self) -> list[list[str]]:
        """What every rank has done, by rank; over the wire's own group, which the lanes do not use."""
        text = json.dumps(self._program.last).encode()
        with unwatched(), torch.inference_mode(False):
            sizes = [int(size) for size in self._gather(torch.tensor([len(text)], device="cpu"))]
            padded = torch.frombuffer(bytearray(text.ljust(max(sizes))), dtype=torch.uint8)
            return [json.loads(bytes(part.tolist())) for part in self._gather(padded)]

    def _gather(self, mine: Tensor) -> Sequence[Tensor]:
        world = self._wire.world
        everyone = _empty(world.size * mine.numel(), mine.dtype)
        self._wire.all_gather(everyone, mine, world, tag="programs").wait()
        return everyone.chunk(world.size)


def _empty(size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="cpu")  # whatever default device the user has set


def describe_difference(programs: Sequence[Sequence[str]]) -> str:
    """Where the programs of the ranks, which are given by rank, first differ, and what each rank did there."""
    longest = max(map(len, programs))
    index = next(index for index in range(longest) if len({_at(program, index) for program in programs}) > 1)
    doers: dict[str, list[int]] = {}
    for rank, program in enumerate(programs):
        doers.setdefault(_at(program, index), []).append(rank)
    shown = _shorten(list(doers))
    told = "; ".join(f"{_name(ranks)}: {text}" for text, ranks in zip(shown, doers.values(), strict=True))
    return (
        f"the ranks have run different programs, where one program must do for all: operation {index + 1} since the "
        f"boundary before is, on {told}; keep the rank out of shapes, offsets, Python numbers and branches, and bring "
        "what depends on it to the device in a tensor"
    )


def _at(program: Sequence[str], index: int) -> str:
    return program[index] if index < len(program) else "none, the program is over"


def _name(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _shorten(texts: Sequence[str]) -> list[str]:
    """The texts around their first difference, where they are long."""
    shortest = min(map(len, texts))
    common = next((at for at in range(shortest) if len({text[at] for text in texts}) > 1), shortest)
    begin = max(common - _BEFORE, 0)
    shown = []
    for text in texts:
        name, _, rest = text.partition("(")
        if len(text) > _SHOWN:
            first = max(begin - len(name) - 1, 0)
            part = rest[first : first + _SHOWN]
            end = "..." if first + _SHOWN < len(rest) else ""
            text = f"{name}({'...' if first else ''}{part}{end}"
        shown.append(text)
    return shown
