"""An XLA device opened through torch_xla: its four facets and what is known about it."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor

from windlass.accelerator.counters import Counters, ProgramCounts
from windlass.accelerator.environment import Environment, prefer_variable, read_environment
from windlass.accelerator.errors import BackendUnusable
from windlass.accelerator.interface import Accelerator, Capabilities
from windlass.accelerator.kernels import Kernel, Kernels
from windlass.accelerator.plugins import describe_cause
from windlass.accelerator.reference import SCHEMAS, reference_kernels
from windlass.backends.cpu.memory import read_capacity
from windlass.backends.xla.collectives import XlaCollectives
from windlass.backends.xla.memory import XlaMemory
from windlass.backends.xla.programs import compare_programs, read_program_counts, read_value
from windlass.backends.xla.runtimes import choose_client, count_tpus
from windlass.backends.xla.streams import LazyLanes
from windlass.backends.xla.torch_module import SEED_BYTES, get_rng_state, register_torch_module, set_rng_state, set_seed

FLOATS: Final = (torch.float32, torch.bfloat16)
"""float16 is left out: torch_xla makes every signalling NaN of it a quiet one on the way, so copies are not exact."""

_FIRST_SEED: Final = 0x9E3779B97F4A7C15
"""Of seed 0: torch_xla writes the numbers 0 and 1 into a program, which is then compiled again for the next step."""
_KERNELS_NEED: Final = ("jax", "torchax")
_REPAIR: Final = "pip install --no-deps --force-reinstall torchax==0.0.13"


class XlaAccelerator(Accelerator):
    """A lazy device. Its random state is the device's seed, which every draw moves on, and behind it
    the state of the host's generator."""

    memory: XlaMemory
    counted_at_opening: ProgramCounts = ProgramCounts()

    def seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        set_seed((seed + _FIRST_SEED) % 2**64)

    def rng_state(self) -> Tensor:
        return torch.cat([get_rng_state(), torch.default_generator.get_state()])

    def set_rng_state(self, state: Tensor) -> None:
        torch.default_generator.set_state(state[SEED_BYTES:].clone())
        set_rng_state(state[:SEED_BYTES])

    def read_host(self, tensor: Tensor, *, tag: str = "step") -> list[float]:
        self.counters.host_reads += 1
        return [float(value) for value in read_value(tensor).reshape(-1).tolist()]

    def to_host(self, tensor: Tensor) -> Tensor:
        self.counters.count_copy("down", "to_host", tensor.numel() * tensor.element_size())
        return read_value(tensor)

    def program_counts(self) -> ProgramCounts:
        """Programs compiled and run by this process since the device was opened. Waits for the device."""
        now, before = read_program_counts(), self.counted_at_opening
        return ProgramCounts(now.compiled - before.compiled, now.executed - before.executed)


def open_torch_xla(index: int = 0) -> XlaAccelerator:
    """Open the device of this rank and meet the other ranks, which must all do the same.

    Raises `BackendUnusable` where there are more ranks than TPUs or the client does not start, and what
    `process_group.join` raises when ranks do not come.
    """
    environment = read_environment()
    name = f"xla:{index}"
    client = choose_client(environment, count_tpus())
    prefer_variable("PJRT_DEVICE", client)  # torch_xla reads it when it is imported, and warns where it is not set
    device = _open_client(name, index, client, environment)
    register_torch_module()
    _check_autograd(name, device)
    on_cpu = client == "CPU"
    counters = Counters()
    collectives = XlaCollectives(name, counters, environment, in_graph=not on_cpu)
    try:
        kernels, reason = _find_kernels()
        accelerator = XlaAccelerator(
            name,
            device,
            XlaMemory(name, device, counters, FLOATS, read_capacity() if on_cpu else _read_device_capacity(device)),
            LazyLanes(collectives.finish, _comparison(collectives, environment)),
            collectives,
            Kernels(SCHEMAS, (*reference_kernels(), *kernels), counters),
            Capabilities(
                dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in FLOATS),
                matmul_dtypes=("float32",) if on_cpu else ("float32", "bfloat16"),
                ordered_reduction=on_cpu,  # ranks on XLA's CPU meet on the host, which adds in their order
                uniform_program=True,
                lazy=True,
                host_place=True,
                shared_device=on_cpu,
            ),
            counters,
            _collect_facts(client, collectives, reason),
        )
        accelerator.counted_at_opening = read_program_counts()
        return accelerator
    except BaseException:
        collectives.close()
        raise


def _open_client(name: str, index: int, client: str, environment: Environment) -> torch.device:
    """Start the PJRT client of this process and give its device, of several ranks each its own."""
    if client != "CPU" and environment.local_num_ranks > (chips := max(count_tpus(), 1)):
        raise BackendUnusable(
            f"{name} cannot be opened by {environment.local_num_ranks} ranks of this host, which has {chips} TPUs: a "
            "TPU belongs to one process, so start one rank for each"
        )
    try:
        import torch_xla
        from torch_xla._internal import pjrt

        if client != "CPU" and environment.local_num_ranks > 1:
            pjrt.initialize_multiprocess(environment.local_rank, environment.local_num_ranks)  # one chip for each
        one_process = environment.local_num_ranks == 1 or client == "CPU"
        return torch.device(torch_xla.device(index) if one_process else torch_xla.device())
    except (ImportError, RuntimeError) as error:  # a library that does not fit, or a client that does not start
        raise BackendUnusable(
            f"{name} cannot be opened: torch_xla gives no {client} device ({describe_cause(error).splitlines()[0]}); "
            "compare the versions of torch and torch_xla, and see PJRT_DEVICE"
        ) from error


def _check_autograd(name: str, device: torch.device) -> None:
    """Go back through one operation, which is never run: autograd counts devices once, at its first backward pass."""
    try:
        torch.ones(2, requires_grad=True, device=device).sum().backward()
    except RuntimeError as error:
        raise BackendUnusable(
            f"{name} cannot be trained on in this process: a backward pass was made here before torch_xla was "
            "imported, and autograd takes no new devices after that; open the accelerator, or import torch_xla, first"
        ) from error


def _find_kernels() -> tuple[Iterable[Kernel], str]:
    """The kernels in JAX, or none and why not. torch_xla's wheel brings an old torchax along, which does not load."""
    for name in _KERNELS_NEED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            return (), f"reference, because {name} does not load ({describe_cause(error).splitlines()[0]}): {_REPAIR}"
    from windlass.backends.xla.kernels import xla_kernels

    return xla_kernels(), "JAX"


def _comparison(collectives: XlaCollectives, environment: Environment) -> Callable[[int], None]:
    """What happens before a boundary: in debug mode ranks compare their programs, otherwise nothing."""
    if not environment.debug or collectives.world.size == 1:
        return lambda number: None
    host, world = collectives.host_transport(), collectives.world
    return lambda number: compare_programs(host, world, f"boundary {number}")


def _collect_facts(client: str, collectives: XlaCollectives, kernels: str) -> dict[str, Any]:
    import torch_xla

    return {
        "runtime": "torch_xla",
        "model": f"XLA's CPU, {platform.machine()}" if client == "CPU" else client,
        "client": f"PJRT {client}",
        "version": torch_xla.__version__,
        "transport": collectives.transport_name,
        "kernels": kernels,
        "run_on_hardware": "no device to run on" if client == "CPU" else "not yet",
    }


def _read_device_capacity(device: torch.device) -> int | None:
    """Bytes of a TPU's memory, None where its client does not tell."""
    import torch_xla.core.xla_model as model

    try:
        return int(model.get_memory_info(device)["bytes_limit"])
    except (RuntimeError, KeyError):
        return None
