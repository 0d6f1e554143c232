"""Overlaps of arguments, on devices that tell addresses and on those that hide them."""

from __future__ import annotations

import pytest
import torch

from windlass.accelerator.interface import Group
from windlass.backends.cpu.arguments import check_overlap, overlap

HIDDEN = "meta"  # its storages have no address, like those of a lazy device
PAIR = Group("pair", (0, 1), 1)


@pytest.mark.parametrize("device", ["cpu", HIDDEN])
def test_tensors_overlap_where_they_share_bytes(device: str) -> None:
    whole, other = torch.empty(8, device=device), torch.empty(8, device=device)
    assert (whole.data_ptr() == 0) == (device == HIDDEN)
    assert overlap(whole, whole[3:4])
    assert overlap(whole[:4], whole[3:])
    assert not overlap(whole[:4], whole[4:])
    assert not overlap(whole, other)
    assert not overlap(whole, other[2:])


@pytest.mark.parametrize("device", ["cpu", HIDDEN])
def test_a_rank_may_give_its_own_part(device: str) -> None:
    room = torch.empty(20, device=device)
    whole = room[3:11]
    check_overlap("all_gather", "weights", whole, room[7:11], PAIR)
    check_overlap("all_gather", "weights", whole, room[11:15], PAIR)
    check_overlap("all_gather", "weights", whole, torch.empty(4, device=device), PAIR)
    for wrong in (room[3:7], room[6:10], room[7:11].view(torch.int32)):
        with pytest.raises(ValueError, match=r"^the input and the output of all_gather 'weights' overlap, but not as"):
            check_overlap("all_gather", "weights", whole, wrong, PAIR)
    check_overlap("all_gather", "weights", room[:4], room[:4], Group("alone", (0,), 0))
