"""The pending program of a lazy device: run it, wait for it, hash it, compare it over the ranks, count it.

torch_xla records tensor operations and runs what is pending for all living tensors at once. Whoever takes a value to
the host must run everything first: asking one tensor alone runs its part, and everything else computes that again.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

from torch import Tensor

from windlass.accelerator.counters import ProgramCounts
from windlass.accelerator.errors import CollectiveMismatch
from windlass.accelerator.interface import Group
from windlass.backends.cpu.transport import Transport

DEVICE_TYPE = "xla"


def run_pending(*, wait: bool = False) -> None:
    """Run what is pending for every living tensor; with `wait`, return when it is over.

    torch_xla starts another stream of random numbers with every program. Here the stream goes on, so that what is
    drawn depends on the draws before it and not on where programs were cut, as by saving a checkpoint.
    """
    import torch_xla
    import torch_xla.core.xla_model as model

    seed = model.get_rng_state()
    torch_xla.sync(wait=wait)
    model.set_rng_state(seed)


def wait_until_idle() -> None:
    """Run what is pending and return when the device has nothing left to do."""
    import torch_xla.core.xla_model as model

    run_pending(wait=True)
    model.wait_device_ops()


def read_value(tensor: Tensor) -> Tensor:
    """The value of a tensor as a host tensor of its own, by one execution at most; none if nothing is pending."""
    if tensor.device.type != DEVICE_TYPE:
        return tensor.detach().to("cpu", copy=True)
    # torch_xla would compute a slice once with the program and once more for the transfer
    value = tensor.detach().clone() if is_slice(tensor) else tensor.detach()
    run_pending()
    return value.to("cpu", copy=True)


def is_slice(tensor: Tensor) -> bool:
    """Whether a tensor is a view into another one, which torch_xla computes anew when it is asked for its value."""
    return tensor.device.type == DEVICE_TYPE and tensor._is_view() and tensor._base is not None


def hash_program(tensors: Sequence[Tensor]) -> str:
    """A digest of the program that would compute `tensors`, equal in all processes; values are no part of it."""
    import torch_xla

    return bytes(torch_xla._XLAC._get_graph_hash(list(tensors))).hex()


def find_tensors() -> list[Tensor]:
    """Every tensor of the device that Python knows, in the order in which they were made. Takes about 0.1 s."""
    import torch_xla

    # `type` and not isinstance, which would wake lazy proxies of other packages
    tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and _is_ours(one)]
    return sorted(tensors, key=torch_xla._XLAC._xla_get_tensor_id)


def _is_ours(tensor: Tensor) -> bool:
    try:
        return tensor.device.type == DEVICE_TYPE
    except RuntimeError:  # an undefined one, as autograd leaves behind, has no device
        return False


def compare_programs(host: Transport, group: Group, where: str) -> None:
    """Compare the pending program over the ranks of a group, which all come to `where`; CollectiveMismatch on all of
    them if they differ.

    A device whose ranks meet inside the program would hang, or add what does not belong together.
    """
    found = [text.split("\n") for text in host.exchange(f"{where}\n{hash_program(find_tensors())}")]
    places = _group_ranks(group.ranks, [place for place, _ in found])
    if len(places) > 1:
        raise CollectiveMismatch(f"the ranks are at different places: {_tell(places, '{ranks} at {what}')}")
    digests = _group_ranks(group.ranks, [digest[:8] for _, digest in found])
    if len(digests) > 1:
        raise CollectiveMismatch(
            f"the ranks are about to run different programs at {where}: {_tell(digests, '{what} on {ranks}')}; look "
            "for shapes, Python numbers or slice offsets that depend on the rank, and make them tensors"
        )


def _group_ranks(ranks: Sequence[int], values: Sequence[str]) -> dict[str, list[int]]:
    """Value -> the ranks that have it."""
    having: dict[str, list[int]] = {}
    for rank, value in zip(ranks, values, strict=True):
        having.setdefault(value, []).append(rank)
    return having


def _tell(having: dict[str, list[int]], form: str) -> str:
    return " and ".join(form.format(what=what, ranks=_name_ranks(ranks)) for what, ranks in having.items())


def read_program_counts() -> ProgramCounts:
    """What this process has compiled and run since it started. Waits for the device, which counts when it runs."""
    import torch_xla.core.xla_model as model
    import torch_xla.debug.metrics as metrics

    model.wait_device_ops()
    return ProgramCounts(
        compiled=metrics.counter_value("UncachedCompile") or 0,
        executed=metrics.counter_value("ExecuteComputation") or 0,
    )


def _name_ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
