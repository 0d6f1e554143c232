"""A device type of PyTorch in pure Python: tensors whose bytes torch does not see, and a kernel for every operator.

It goes in through torch's door for vendors, PrivateUse1, by its experimental entry for Python backends. A storage has
no address; its bytes lie in a tensor of the host that only the kernels here reach. So whatever treats these tensors as
host memory fails, and what computes has gone through the device. Once per process: torch knows one such device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.utils import _pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"

_library = torch.library.Library("_", "IMPL")  # for every operator; kernels go when their library does
_bytes: dict[int, Tensor] = {}  # identity of a storage -> its bytes on the host
_VIEWS = ("aten::as_strided", "aten::view", "aten::_reshape_alias", "aten::unfold", "aten::set_")


class PretendModule:
    """What a vendor's `torch.<name>` offers. Without streams, so that lanes are synchronous."""

    def __init__(self) -> None:
        self.generator = torch.Generator()  # the device draws from its own
        self.calls: dict[str, int] = {}  # operator -> how often it ran on the device

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, index: int) -> None:
        assert index == 0

    def synchronize(self) -> None:
        return None

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    def get_rng_state(self) -> Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor) -> None:
        self.generator.set_state(state)

    def get_device_name(self, device: torch.device) -> str:
        return f"{device.type} processor"


def register() -> PretendModule:
    """Make the device known to torch, with this module as `torch.pretend`."""
    module = PretendModule()
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    _library.fallback(_run, "PrivateUse1")
    _running.append(module)
    return module


_running: list[PretendModule] = []
_address = 2**46


def _run(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """The kernel of every operator: on the bytes behind its tensors, results into new storages."""
    name = operator._schema.name
    _running[0].calls[name] = _running[0].calls.get(name, 0) + 1
    if name in _VIEWS:  # metadata only, which the host's kernel does without looking at bytes
        return operator.redispatch(DispatchKeySet(DispatchKey.CPU), *args, **kwargs)
    if name == "aten::_copy_from":
        source, destination = args[:2]
        _to_host(destination).copy_(_to_host(source))
        return destination
    host_args, host_kwargs = _pytree.tree_map(_to_host, (args, kwargs))
    if any(argument.name == "generator" for argument in operator._schema.arguments):
        host_kwargs["generator"] = _running[0].generator
    results = operator(*host_args, **host_kwargs)
    written = []
    for index, argument in enumerate(operator._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            by_position = index < len(args)
            given = args[index] if by_position else kwargs[argument.name]
            host = host_args[index] if by_position else host_kwargs[argument.name]
            if isinstance(given, Tensor) and given.shape != host.shape:  # an output of size 0 takes what it needs
                _store(given, host)
            written.append(given)
    if written:
        return tuple(written) if isinstance(results, tuple) else written[0]
    return _pytree.tree_map(_to_device, results)


def _to_host(value: Any) -> Any:
    """The bytes of a device tensor as a host tensor of the same layout, whose writes it sees."""
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if not isinstance(value, Tensor) or value.device.type != NAME:
        return value
    data = _bytes[value.untyped_storage()._cdata]
    return data.view(value.dtype).as_strided(value.shape, value.stride(), value.storage_offset())


def _to_device(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return _store(torch._C._acc.create_empty_tensor((0,), value.dtype), value)


def _store(tensor: Tensor, value: Tensor) -> Tensor:
    """Give a device tensor a new storage with the layout and a copy of the bytes of a host tensor."""
    numel = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    data = torch.empty(numel if value.numel() else 0, dtype=value.dtype)
    data.as_strided(value.shape, value.stride()).copy_(value)
    device = torch.device(NAME, 0)
    storage = torch._C._construct_storage_from_data_pointer(_next_address(data.nbytes), device, data.nbytes)
    _bytes[storage._cdata] = data.view(torch.uint8)
    return tensor.set_(storage, 0, value.shape, value.stride())


def _next_address(nbytes: int) -> int:
    """An address of nothing, aligned as devices align."""
    global _address
    _address += -(-max(nbytes, 1) // 256) * 256
    return _address
