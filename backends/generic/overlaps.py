"""Whether two tensors share memory, on devices that hide their addresses too: each of theirs is 0."""

from __future__ import annotations

from torch import Tensor

from windlass.accelerator.interface import Group


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two contiguous tensors share memory."""
    hidden = not (one.data_ptr() and other.data_ptr())
    if hidden and one.untyped_storage()._cdata != other.untyped_storage()._cdata:
        return False
    begin, start = _begin(one, hidden), _begin(other, hidden)
    return begin < start + other.nbytes and start < begin + one.nbytes


def check_overlap(kind: str, tag: str, whole: Tensor, part: Tensor, group: Group) -> None:
    """The part may be this rank's own part of the whole, and may not touch it otherwise; else ValueError."""
    if not part.numel() or group.size == 1 or not overlap(whole, part):
        return
    hidden = not (whole.data_ptr() and part.data_ptr())
    if part.dtype != whole.dtype or _begin(part, hidden) != _begin(whole, hidden) + group.rank * part.nbytes:
        raise ValueError(f"the input and the output of {kind} {tag!r} overlap, but not as this rank's part")


def _begin(tensor: Tensor, hidden: bool) -> int:
    """The first byte: its address, or where it lies in its storage."""
    return int(tensor.storage_offset()) * tensor.element_size() if hidden else tensor.data_ptr()
