"""A GPU opened through torch.cuda, with what is known about it."""

from __future__ import annotations

import importlib
import logging
import subprocess
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from windlass.accelerator.environment import Environment, prefer_variable, read_environment
from windlass.accelerator.interface import TensorFunction
from windlass.accelerator.kernels import Kernel
from windlass.accelerator.plugins import describe_cause
from windlass.backends.cuda.driver import Driver
from windlass.backends.cuda.facts import collect_facts, describe_allocator
from windlass.backends.cuda.graphs import GraphRecorder
from windlass.backends.cuda.host_memory import make_host_allocator
from windlass.backends.cuda.own_device import check_own_devices, check_ranks, describe_own_device
from windlass.backends.generic.captures import CapturedFunction
from windlass.backends.generic.device import GenericAccelerator, open_device
from windlass.backends.generic.process_groups import Agreement
from windlass.backends.generic.streams import DeviceLanes

_CLEAN_UP_ONLY: Final = "2"
"""TORCH_NCCL_ASYNC_ERROR_HANDLING: a collective that fails is ended, and the process lives to say why."""

SENT_BYTES: Final = 16 * 2**20
"""Up to so many bytes go to the device without the host waiting for it."""

logger = logging.getLogger("windlass")


class CudaAccelerator(GenericAccelerator):
    """A GPU of NVIDIA."""

    streams: DeviceLanes

    def send(self, tensor: Tensor) -> Tensor:
        """Through pinned memory of torch's, which the copy reads while the host goes on. What is pinned already may be
        the caller's to change, and what is large is not worth a second copy."""
        if tensor.device.type != "cpu" or tensor.nbytes > SENT_BYTES or tensor.is_pinned():
            return super().send(tensor)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def capture(self, function: TensorFunction) -> TensorFunction:
        """The function as CUDA graphs, one for each list of tensors that it meets more than once.

        What it allocates lies in memory of its own, which the books of `memory` do not show. If it cannot be recorded,
        the facts say so.
        """

        def tell(failure: str) -> None:
            self.facts["capture_failed"] = failure

        return CapturedFunction(function, GraphRecorder(self.device), self.counters, self.name, tell)

    def allocator_facts(self) -> dict[str, Any]:
        """How torch's caching allocator is doing now; see `facts.describe_allocator`."""
        settings = torch.cuda.memory._snapshot().get("allocator_settings", {})
        return describe_allocator(torch.cuda.memory_stats(self.device), settings)


def open_cuda(index: int = 0) -> CudaAccelerator:
    """Open the GPU of this rank and meet the other ranks, which must all do the same.

    Raises `BackendUnusable` where ranks would share a GPU or the device lacks what is needed, and what `join` raises
    when ranks do not come.
    """
    environment = read_environment()
    driver = Driver()
    check_ranks(f"cuda:{index}", environment, driver.count())
    prefer_variable("TORCH_NCCL_ASYNC_ERROR_HANDLING", _CLEAN_UP_ONLY)
    torch.cuda.set_device(index)
    torch.cuda.init()
    host, where = make_host_allocator(driver, index)
    kernels, kernel_words = load_kernels()
    accelerator = open_device(
        "cuda",
        index,
        name="cuda",
        accelerator_class=CudaAccelerator,
        kernels=kernels,
        matmul_dtypes=choose_matmul_dtypes(driver.compute_capability(index)),
        process_group="nccl",
        process_group_options=_make_nccl_options,
        agreement=choose_agreement(environment),
        host_allocator=host,
    )
    assert isinstance(accelerator, CudaAccelerator)
    try:
        _wake_autograd(accelerator.device)
        rows = accelerator.collectives.exchange(describe_own_device(driver, index))
        check_own_devices(accelerator.name, rows)
        accelerator.facts |= collect_facts(driver, index, str(torch.version.cuda))
        accelerator.facts |= {"host_memory_lies": where, "kernels": kernel_words}
        if accelerator.collectives.world.size > 1:
            accelerator.facts["nccl_version"] = ".".join(map(str, torch.cuda.nccl.version()))
    except BaseException:
        accelerator.close()
        raise
    return accelerator


def choose_matmul_dtypes(capability: tuple[int, int]) -> tuple[str, ...]:
    """The dtypes whose products run on tensor cores, behind float32, which any GPU has."""
    if capability >= (8, 0):
        return "float32", "bfloat16", "float16"
    return ("float32", "float16") if capability >= (7, 0) else ("float32",)


def choose_agreement(environment: Environment) -> Agreement:
    """Ranks compare their calls on the host: each new one, or with WINDLASS_DEBUG every one."""
    return "always" if environment.debug else "first use"


def load_kernels() -> tuple[Iterable[Kernel], str]:
    """The kernels in Triton, or none and why not. Triton is asked for a target, which builds what launching needs."""
    try:
        importlib.import_module("triton.runtime.driver").driver.active.get_current_target()
        from windlass.backends.triton.kernels import triton_kernels

        return triton_kernels(), "Triton"
    except (ImportError, OSError, RuntimeError, AssertionError, subprocess.CalledProcessError) as error:
        cause = describe_cause(error).splitlines()[0]
        logger.warning(
            "cuda runs the reference kernels, which are slower, because Triton cannot be used (%s): install triton and "
            "a C compiler",
            cause,
        )
        return (), f"reference, because Triton cannot be used: {cause}"


def _wake_autograd(device: torch.device) -> None:
    """Run a kernel in autograd's thread for the device, which has no context before: where its first call were one of
    cuBLAS, torch would warn of that."""
    (torch.ones(1, device=device, requires_grad=True) * 2).backward()


def _make_nccl_options(timeout: timedelta) -> Any:
    """Collectives go before other kernels: somebody waits for them, and they leave most of the device to others."""
    if not dist.is_nccl_available():
        raise RuntimeError("this build of torch has no NCCL")
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout
    return options
