"""Loads and stores that other processes see in order, and the search for a rank that is behind.

Ranks on one host talk through words in shared pages. Plain stores are ordered on x86 but not on ARM, so
the words that publish something go through atomic instructions with a full fence on either side.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_WORD = ir.IntType(64)


@intrinsic
def _load(_typing: Any, _address: Any) -> Any:
    """The word at an address; nothing that follows is read before it."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], _WORD.as_pointer()), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def _store(_typing: Any, _address: Any, _value: Any) -> Any:
    """Store a word at an address after everything written before it, and before anything read after it."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        builder.store_atomic(arguments[1], builder.inttoptr(arguments[0], _WORD.as_pointer()), "seq_cst", 8)
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@njit(types.void(types.int64, types.int64), nogil=True, cache=True)
def publish(address: int, value: int) -> None:
    """Store `value` in the word at `address`; whoever sees it also sees everything written before."""
    _store(address, value)


@njit(types.int64(types.int64[::1], types.int64, types.int64), nogil=True, cache=True)
def find_behind(addresses: Any, target: int, attempts: int) -> int:
    """Index of a word that is below `target` after looking `attempts` times; -1 once none is."""
    behind = -1
    for _ in range(attempts):
        behind = -1
        for i in range(addresses.size):
            if _load(addresses[i]) < target:
                behind = i
                break
        if behind < 0:
            break
    return behind
