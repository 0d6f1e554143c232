"""What the collectives ask of their arguments, whatever the transport: one sentence when it is not met."""

from __future__ import annotations

from torch import Tensor

from windlass.accelerator.interface import Group
from windlass.backends.cpu.transport import check_dtype


def check_tensors(kind: str, tag: str, *tensors: Tensor) -> list[Tensor]:
    """The tensors as plain memory, for what moves is no part of a graph; ValueError if they are not flat."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            raise ValueError(f"{kind} {tag!r} on the CPU needs tensors in its memory, got one on {tensor.device}")
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(
                f"{kind} {tag!r} needs contiguous one-dimensional tensors, got shape {tuple(tensor.shape)} with "
                f"strides {tensor.stride()}"
            )
        check_dtype(tensor.dtype)
    return [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]


def check_overlap(kind: str, tag: str, whole: Tensor, part: Tensor, group: Group) -> None:
    """The part may be this rank's own part of the whole, and may not touch it otherwise."""
    if not part.numel() or not overlap(whole, part) or group.size == 1:
        return
    own = whole.data_ptr() + group.rank * part.numel() * whole.element_size()
    if part.data_ptr() != own or part.dtype != whole.dtype:
        raise ValueError(f"the input and the output of {kind} {tag!r} overlap, but not as this rank's part")


def check_op(kind: str, tag: str, op: str) -> None:
    if op not in ("sum", "max"):
        raise ValueError(f"{kind} {tag!r} reduces by 'sum' or 'max', got {op!r}")


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two contiguous tensors share memory."""
    begin, start = one.data_ptr(), other.data_ptr()
    return begin < start + other.nbytes and start < begin + one.nbytes
