"""Any device that PyTorch knows, opened through its device module: torch.cuda, torch.xpu, torch.<vendor>.

Everything is asked of the device, nothing assumed: whether it has streams, which dtypes it computes in, how much
memory it has, how host memory is page-locked. A backend gives its name, and what it knows better.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.accelerator.environment import read_environment
from windlass.accelerator.errors import BackendUnusable
from windlass.accelerator.interface import Accelerator, Capabilities
from windlass.accelerator.kernels import Kernel, Kernels
from windlass.accelerator.reference import SCHEMAS, reference_kernels
from windlass.backends.generic.collectives import MakeOptions, ProcessGroupCollectives
from windlass.backends.generic.host_memory import HostAllocator, PageLock, find_page_lock
from windlass.backends.generic.memory import DeviceMemory
from windlass.backends.generic.process_groups import Agreement
from windlass.backends.generic.streams import DeviceLanes, open_lanes

_RANDOM = ("manual_seed", "get_rng_state", "set_rng_state")


class GenericAccelerator(Accelerator):
    """A device of PyTorch. Its random state is that of the device and, behind it, that of the host."""

    memory: DeviceMemory
    collectives: ProcessGroupCollectives
    module: Any  # of the device: torch.cuda, torch.xpu, torch.<vendor>

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if self._has_generator:
            self.module.manual_seed(seed)

    def rng_state(self) -> Tensor:
        host = torch.default_generator.get_state()
        if not self._has_generator:
            return host
        device = self.module.get_rng_state().to("cpu")
        return torch.cat([_write_length(device.numel()), device, host])

    def set_rng_state(self, state: Tensor) -> None:
        if self._has_generator:
            length = _read_length(state)
            self.module.set_rng_state(state[8 : 8 + length].clone())
            state = state[8 + length :].clone()
        torch.default_generator.set_state(state)

    def read_host(self, tensor: Tensor, *, tag: str = "step") -> list[float]:
        self._block(tensor)
        return super().read_host(tensor, tag=tag)

    def to_host(self, tensor: Tensor) -> Tensor:
        self._block(tensor)
        return super().to_host(tensor)

    def close(self) -> None:
        """Give back groups and memory. Safe to call twice."""
        try:
            self.memory.close()
        finally:  # it may have waited for a peer that is lost
            super().close()

    def _block(self, tensor: Tensor) -> None:
        """Wait for the current lane where the read itself does not: what lies on the host is read at once. With peers
        wait in any case, since the runtime's own wait does not look at them: see `host_waits`."""
        on_host = tensor.device.type != self.device.type
        if isinstance(self.streams, DeviceLanes) and (on_host or self.streams.host_wait.is_watched):
            self.streams.record().block()

    @property
    def _has_generator(self) -> bool:
        """The host's own generator is the device's where the device is the host."""
        return self.device.type != "cpu"


def open_device(
    device_type: str,
    index: int = 0,
    *,
    name: str,
    accelerator_class: type[GenericAccelerator] = GenericAccelerator,
    module: Any = None,
    kernels: Iterable[Kernel] = (),
    dtypes: tuple[str, ...] | None = None,
    matmul_dtypes: tuple[str, ...] = ("float32",),
    shared_device: bool = False,
    process_group: str | None = None,
    process_group_options: MakeOptions | None = None,
    agreement: Agreement = "always",
    ordered_reduction: bool = False,
    page_lock: PageLock | None = None,
    torch_pins: bool = False,
    host_allocator: HostAllocator | None = None,
) -> GenericAccelerator:
    """Open device `index` of a type that torch knows as the accelerator `name:index`, and meet the other ranks.

    What is opened is an `accelerator_class`. `module` is by default torch's for the type. `dtypes` are asked of the
    device unless they are given. `process_group` names a backend of torch.distributed in place of torch's choice for
    the type, and `process_group_options` makes its options from a timeout. `agreement` says when ranks compare calls
    before they make them: see the note in `process_groups`. `ordered_reduction` adds terms in rank order; a
    reduce-scatter then takes as much extra memory as its input. Host memory is page-locked by `page_lock`, by the
    runtime of the module where it has CUDA's call for that, or, with `torch_pins`, by torch, for vendors whose
    allocator is known not to round; otherwise it is ordinary memory. `host_allocator` replaces all that.

    Raises `BackendUnusable` where the device lacks what is needed, and what `join` raises when ranks do not come.
    """
    module = torch.get_device_module(device_type) if module is None else module
    name = f"{name}:{index}"
    if device_type != "cpu":
        if missing := [needed for needed in _RANDOM if not hasattr(module, needed)]:
            raise BackendUnusable(
                f"{name} cannot be opened: the device module of {device_type!r} has no {', '.join(missing)}, which "
                "restoring random numbers needs; implement them in the vendor's package"
            )
        module.set_device(index)  # what is asked below is asked of the current device
    device = torch.device(device_type) if device_type == "cpu" else torch.device(device_type, index)
    counters = Counters()
    streams = open_lanes(module)
    host = host_allocator or HostAllocator(page_lock or find_page_lock(module, device), torch_pins=torch_pins)
    collectives = ProcessGroupCollectives(
        name,
        device,
        streams,
        counters,
        read_environment(),
        backend=process_group,
        make_options=process_group_options,
        agreement=agreement,
        ordered=ordered_reduction,
    )
    try:
        dtypes = find_dtypes(device) if dtypes is None else dtypes
        float64 = _computes(device, torch.float64)
        capabilities = Capabilities(
            dtypes=dtypes,
            matmul_dtypes=matmul_dtypes,
            views=True,
            asynchronous_lanes=isinstance(streams, DeviceLanes),
            ordered_reduction=ordered_reduction,  # of one rank too: what is declared does not depend on the job
            host_place=True,
            float64=float64,
            shared_device=shared_device,
        )
        accelerator = accelerator_class(
            name,
            device,
            DeviceMemory(name, device, module, streams, counters, host, (*dtypes, *("float64",) * float64)),
            streams,
            collectives,
            Kernels(SCHEMAS, (*reference_kernels(), *kernels), counters),
            capabilities,
            counters,
            {
                "model": read_model(module, device),
                "streams": "one per lane" if isinstance(streams, DeviceLanes) else "none",
                "host_memory": host.kind,
                "transport": collectives.transport_name,
                "agreement": agreement,
            },
        )
        accelerator.module = module
        return accelerator
    except BaseException:
        collectives.close()
        raise


def find_dtypes(device: torch.device) -> tuple[str, ...]:
    """Those of the floating dtypes in which the device computes."""
    found = [dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if _computes(device, dtype)]
    return tuple(str(dtype).removeprefix("torch.") for dtype in found)


def read_model(module: Any, device: torch.device) -> str:
    """What the device calls itself, or its type where it has no name."""
    if callable(read := getattr(module, "get_device_name", None)):
        return str(read(device))
    if callable(read := getattr(module, "get_device_properties", None)):
        return str(getattr(read(device), "name", device.type))
    return device.type


def _computes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a sum of products in this dtype comes out right."""
    try:
        ones = torch.ones(4, dtype=dtype, device=device)
        return float((ones * ones + ones).sum().to("cpu")) == 8.0
    except (RuntimeError, TypeError, NotImplementedError):  # every device refuses in its own way
        return False


def _write_length(length: int) -> Tensor:
    return torch.frombuffer(bytearray(length.to_bytes(8, "little")), dtype=torch.uint8)


def _read_length(state: Tensor) -> int:
    return int.from_bytes(bytes(state[:8].tolist()), "little")
