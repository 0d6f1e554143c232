"""What the collectives ask of their arguments, whatever the transport: one sentence when it is not met."""

from __future__ import annotations

from torch import Tensor

from windlass.accelerator.interface import Group
from windlass.backends.cpu.transport import check_dtype


def check_tensors(
    kind: str, tag: str, *tensors: Tensor, device_type: str = "cpu", name: str = "the CPU"
) -> list[Tensor]:
    """The tensors as plain memory, for what moves is no part of a graph; ValueError unless they are flat and lie on
    the device, which messages call `name`."""
    for tensor in tensors:
        if tensor.device.type != device_type:
            raise ValueError(f"{kind} {tag!r} on {name} needs tensors in its memory, got one on {tensor.device}")
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{kind} {tag!r} needs contiguous one-dimensional tensors, got shape {tuple(tensor.shape)} with "
                f"strides {tensor.stride()}"
            )
        check_dtype(tensor.dtype)
    return [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]


def check_op(kind: str, tag: str, op: str) -> None:
    if op not in ("sum", "max"):
        raise ValueError(f"{kind} {tag!r} reduces by 'sum' or 'max', got {op!r}")


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two contiguous tensors share memory, on devices that hide their addresses too: each of theirs is 0."""
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
