"""What memory facets have in common that keep books of their own: accounts, budgets, and the check of a copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Generic, TypeVar

from torch import Tensor

from windlass.accelerator.errors import Unsupported
from windlass.accelerator.interface import Memory, Place
from windlass.backends.cpu.accounts import Account

Books = TypeVar("Books", bound=Account)

COPY_KINDS: Final = {
    (Place.HOST, Place.DEVICE): "up",
    (Place.DEVICE, Place.HOST): "down",
    (Place.HOST, Place.HOST): "host",
}
"""(of the source, of the destination) -> how a copy is counted where device and host are the places."""


class BookedMemory(Memory, Generic[Books]):
    """Memory with an account for each place that it offers."""

    def __init__(self, name: str, accounts: Mapping[Place, Books]) -> None:
        """`name`, for messages: "cuda:0"."""
        self._name = name
        self._accounts = dict(accounts)

    def reset_peak(self, place: Place = Place.DEVICE) -> None:
        account = self._account(place)
        account.peak = account.used

    def set_budget(self, limit: int | None, place: Place = Place.DEVICE) -> None:
        if limit is not None and limit < 0:
            raise ValueError(f"a budget is a number of bytes from 0, or None, got {limit}")
        self._account(place).budget = limit

    def _account(self, place: Place) -> Books:
        if place not in self._accounts:
            raise Unsupported(f"{self._name} offers no place {place.value!r}; use Place.HOST, or files of your own")
        return self._accounts[place]


def check_copy(destination: Tensor, source: Tensor, tag: str) -> None:
    """ValueError unless shapes and dtypes are equal."""
    if destination.shape != source.shape or destination.dtype != source.dtype:
        raise ValueError(
            f"copy {tag!r} needs equal shapes and dtypes, got {tuple(source.shape)} of {source.dtype} into "
            f"{tuple(destination.shape)} of {destination.dtype}; to cast, use the kernel scale_cast"
        )
