"""What a waiting rank looks for: a peer that gave up, left, died, or is late beyond patience."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from windlass.accelerator.errors import CollectiveMismatch, CollectiveTimeout, PeerLost
from windlass.accelerator.interface import Group
from windlass.backends.cpu.atomics import find_behind
from windlass.backends.cpu.board import Board, Words
from windlass.backends.cpu.control_page import GAVE_UP, LEFT, MISMATCHED, OPEN, ControlPage
from windlass.backends.cpu.peers import Peer
from windlass.backends.cpu.transport import Call

_LIFE_CHECK_SECONDS: Final = 0.2  # reading the state of a process costs some microseconds


class PeerWatch:
    """Decides for one group whether waiting on makes sense."""

    def __init__(self, group: Group, peers: Sequence[Peer], control: Sequence[ControlPage], board: Board) -> None:
        self._group = group
        self._me = group.ranks[group.rank]
        self._others = [
            (index, peer, page)
            for index, (peer, page) in enumerate(zip(peers, control, strict=True))
            if index != group.rank
        ]
        self._board = board

    def watch(self, words: Words, target: int, call: Call, verb: str) -> Callable[[float], None]:
        """A check to be called with the seconds waited so far: it raises, here and on all peers, if a rank whose
        word is below `target` will not catch up. `verb` says what is expected of the late: "arrive in"."""
        next_life_check = _LIFE_CHECK_SECONDS

        def is_behind(index: int) -> bool:
            return bool(find_behind(words[index : index + 1], target, 1) >= 0)

        def check(waited: float) -> None:
            nonlocal next_life_check
            for index, peer, page in self._others:
                state = page.state
                if state == MISMATCHED:
                    self._board.fail(CollectiveMismatch(page.reason))
                if state == GAVE_UP:
                    self._lose(f"rank {peer.rank} gave up while rank {self._me} was in {call}: {page.reason}")
                if state == LEFT and is_behind(index):
                    self._lose(f"rank {peer.rank} left while rank {self._me} waited for it in {call}")
            if waited >= next_life_check:
                next_life_check = waited + _LIFE_CHECK_SECONDS
                for index, peer, page in self._others:
                    # the last two: it may have caught up, or said why it gives up, just before its end
                    if is_behind(index) and not peer.is_alive() and page.state == OPEN and is_behind(index):
                        self._lose(
                            f"rank {peer.rank} (pid {peer.pid}) died while rank {self._me} waited for it in {call}"
                        )
            if waited >= self._board.timeout_seconds:
                self._give_up([peer.rank for index, peer, _ in self._others if is_behind(index)], call, verb)

        return check

    def _lose(self, text: str) -> None:
        self._board.fail(PeerLost(text))

    def _give_up(self, late: Sequence[int], call: Call, verb: str) -> None:
        if not late:
            return
        who = f"rank {late[0]}" if len(late) == 1 else f"ranks {', '.join(map(str, late))}"
        self._board.fail(
            CollectiveTimeout(
                f"{who} did not {verb} {call} within {self._board.timeout_seconds:g} s while rank {self._me} waited; "
                "see what keeps it, or set WINDLASS_TIMEOUT to more seconds"
            )
        )
