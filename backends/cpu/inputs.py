"""Where the input of a call lies, on the side of its rank, and how peers get at it, on theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from windlass.accelerator.errors import CollectiveMismatch, PeerLost
from windlass.accelerator.interface import Group
from windlass.backends.cpu.control_page import MAIL, MAILBOX, NOWHERE, REGION, STAGING, ControlPage, InputPlace
from windlass.backends.cpu.peers import Peer
from windlass.backends.cpu.regions import RegionTable
from windlass.backends.cpu.shared_pages import Door, Pages, create_pages, open_pages, round_to_pages


class Inputs:
    """The inputs of one group's calls: in mailboxes, in shared allocations, or in staging pages."""

    def __init__(
        self, group: Group, peers: Sequence[Peer], control: Sequence[ControlPage], door: Door, regions: RegionTable
    ) -> None:
        self._group = group
        self._peers = peers
        self._control = control
        self._own = control[group.rank]
        self._door = door
        self._regions = regions
        self._staging: Pages | None = None
        self._staging_serial = 0  # the call for which the staging pages were made
        self.staging_used = 0  # the last call whose input lay there
        self._staged: dict[int, tuple[int, Pages]] = {}  # index of a peer -> serial, its staging pages

    def place(self, number: int, input: Tensor | None, copied: bool) -> InputPlace:
        """Make the input of call `number` readable for peers, where it lies unless it is to be `copied`.

        An answer of STAGING tells the caller to `stage` it, once all peers are done with `staging_used`.
        """
        if input is None or not input.numel():
            return InputPlace(NOWHERE)
        if input.nbytes <= MAIL:
            offset = self._own.mail_offset(number)
            self._own.pages.view(offset, input.numel(), input.dtype).copy_(input)
            return InputPlace(MAILBOX, offset=offset)
        located = None if copied else self._regions.locate(input)
        if located is not None and located[0].serves(self._group):
            return InputPlace(REGION, located[0].serial, located[1])
        return InputPlace(STAGING)

    def stage(self, number: int, input: Tensor) -> InputPlace:
        """Copy the input to the staging pages, which nobody may be reading."""
        if self._staging is None or self._staging.nbytes < input.nbytes:
            if self._staging is not None:
                self._staging.seal()
                self._staging = None
            self._staging = create_pages(round_to_pages(input.nbytes), self._door)
            self._staging_serial = number
        self._staging.view(0, input.numel(), input.dtype).copy_(input)
        self.staging_used = number
        return InputPlace(STAGING, self._staging_serial, 0, self._staging.nbytes, self._staging.path)

    @property
    def unsealed(self) -> int:
        """The call after which every peer has mapped the staging pages; 0 if nothing is to be sealed."""
        return self._staging_serial if self._staging is not None and self._staging.is_open else 0

    def seal(self) -> None:
        assert self._staging is not None
        self._staging.seal()

    def meet(self, number: int) -> None:
        """Map the staging pages of all peers, even of those that are not read from: they are sealed afterwards."""
        for index, control in enumerate(self._control):
            place = control.read_place(number)
            if place.where == STAGING:
                self._staging_of(index, place)

    def read(self, number: int, index: int, count: int, dtype: torch.dtype) -> Tensor:
        """The first `count` elements of the input of a rank to call `number`, where they lie."""
        control = self._control[index]
        place = control.read_place(number)
        if place.where == MAILBOX:
            return control.pages.view(place.offset, count, dtype)
        if place.where == STAGING:
            return self._staging_of(index, place).view(0, count, dtype)
        if place.where == REGION:
            region = self._regions.find(place.serial)
            if region is not None:
                return region.pages_of(self._group.ranks[index]).view(place.offset, count, dtype)
            raise CollectiveMismatch(
                f"rank {self._group.ranks[index]} sends from a shared allocation that rank "
                f"{self._group.ranks[self._group.rank]} has released: release shared tensors on all ranks alike"
            )
        return torch.empty(0, dtype=dtype, device="cpu")

    def open(self, index: int, place: InputPlace) -> Pages:
        """Map pages that a peer offers."""
        try:
            return open_pages(place.path, place.nbytes)
        except OSError as error:
            peer = self._peers[index]
            fate = "cannot be reached" if peer.is_alive() else "were lost when it died"
            raise PeerLost(f"the shared pages of rank {peer.rank} (pid {peer.pid}) {fate}: {error}") from error

    def close(self) -> None:
        self._staged.clear()
        if self._staging is not None:
            self._staging.seal()
            self._staging = None

    def _staging_of(self, index: int, place: InputPlace) -> Pages:
        if index == self._group.rank:
            assert self._staging is not None
            return self._staging
        serial, pages = self._staged.get(index, (0, None))
        if pages is None or serial != place.serial:
            pages = self.open(index, place)
            self._staged[index] = place.serial, pages
        return pages
