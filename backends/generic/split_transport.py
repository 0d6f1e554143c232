"""One group for tensors of the device and of the host beside it: each kind goes its own way, mixed calls go none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from windlass.accelerator.interface import ReduceOp, Work
from windlass.backends.cpu.arguments import check_tensors
from windlass.backends.cpu.transport import Call, Transport
from windlass.backends.generic.process_groups import ProcessGroupTransport
from windlass.backends.generic.streams import DeviceLanes, OneLane


class SplitTransport(Transport):
    """Hands calls with device tensors to the device's library and calls with host tensors to the host's transport.

    The host's begins at once and knows no lanes. So before such a call the host waits until the current lane is empty:
    what the lane was waiting for, such as a copy down, is then there to be sent.
    """

    def __init__(self, device: ProcessGroupTransport, host: Transport, streams: DeviceLanes | OneLane) -> None:
        super().__init__(device.group)
        self.name = device.name
        self.device = device
        self.host = host
        self._streams = streams

    def all_gather(self, output: Tensor, input: Tensor, call: Call) -> Work:
        return self._note(output, self._choose(output).all_gather(output, input, call))

    def reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, call: Call) -> Work:
        return self._note(output, self._choose(output).reduce_scatter(output, input, op, call))

    def all_to_all(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], call: Call
    ) -> Work:
        transport = self._choose(output)
        return self._note(output, transport.all_to_all(output, input, output_splits, input_splits, call))

    def all_reduce(self, tensor: Tensor, op: ReduceOp, call: Call) -> Work:
        return self._note(tensor, self._choose(tensor).all_reduce(tensor, op, call))

    def broadcast(self, tensor: Tensor, source: int, call: Call) -> Work:
        return self._note(tensor, self._choose(tensor).broadcast(tensor, source, call))

    def barrier(self, call: Call) -> None:
        self.device.barrier(call)

    def exchange(self, text: str) -> list[str]:
        return self.device.exchange(text)

    def _choose(self, tensor: Tensor) -> Transport:
        if tensor.device.type != "cpu":
            return self.device
        if isinstance(self._streams, DeviceLanes):
            self._streams.record().block()
        return self.host

    def _note(self, tensor: Tensor, work: Work) -> Work:
        """Have `synchronize` wait for what the host carries out; lanes know what they carry out themselves."""
        return self._streams.pending.note(work) if tensor.device.type == "cpu" else work


def check_split(kind: str, tag: str, *tensors: Tensor, device_type: str, name: str) -> list[Tensor]:
    """The tensors as plain memory; ValueError unless they are flat and lie all on the device, or all on the host."""
    types = {tensor.device.type for tensor in tensors}
    if types == {"cpu"}:
        return check_tensors(kind, tag, *tensors, name=name)
    if types == {"cpu", device_type}:
        raise ValueError(
            f"{kind} {tag!r} on {name} needs all its tensors on the device or all on the host, got some on each; copy "
            "one first"
        )
    return check_tensors(kind, tag, *tensors, device_type=device_type, name=name)
