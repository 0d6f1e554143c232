"""A program: open the runtime torch_tpu over a stand-in of the package, and print what happened as JSON.

The stand-in makes the pretend device one of type "tpu". Like torch_tpu 0.2 it refuses, in its own module, what
torch.accelerator offers, and has streams that order nothing.
"""

from __future__ import annotations

import json
import sys
from typing import Any, NoReturn

import torch

import pretend_device
from windlass.accelerator.interface import Place


class RefusingModule(pretend_device.PretendModule):
    """A device module whose functions of torch.accelerator are no longer to be used."""

    def set_device(self, index: int) -> NoReturn:
        raise RuntimeError("use torch.accelerator.set_device_index")

    def synchronize(self) -> NoReturn:
        raise RuntimeError("use torch.accelerator.synchronize")

    def Stream(self) -> NoReturn:
        raise NotImplementedError("streams are not fully implemented")

    def get_device_properties(self, device: torch.device) -> Any:
        return type("Properties", (), {"name": f"{device.type} processor", "total_memory": 2**20})()


synchronized: list[None] = []  # as often as all of the device was waited for


def register() -> None:
    """What importing the package does. torch's entry for Python devices has no guard that synchronizes them."""
    torch.accelerator.synchronize = lambda: synchronized.append(None)  # type: ignore[assignment, misc]
    pretend_device.NAME = "tpu"
    pretend_device.PretendModule = RefusingModule  # type: ignore[misc]
    pretend_device.register()


def main() -> dict[str, Any]:
    from windlass.backends.xla.torch_tpu import open_torch_tpu

    accelerator = open_torch_tpu(0)
    memory, group = accelerator.memory, accelerator.collectives.world
    tensor = memory.empty((2, 3), torch.float32, tag="kept")
    host = memory.empty((2, 3), torch.float32, Place.HOST)
    memory.copy(tensor, host.copy_(torch.arange(6.0).view(2, 3))).wait()
    flat = tensor.view(-1)
    accelerator.collectives.all_reduce(flat, group).wait()
    used = memory.stats().used.value
    accelerator.seed(3)
    state = accelerator.rng_state()
    drawn = torch.rand(2, device=accelerator.device).to("cpu")
    accelerator.set_rng_state(state)
    report = {
        "name": accelerator.name,
        "device": str(accelerator.device),
        "capabilities": vars(accelerator.capabilities),
        "facts": accelerator.facts,
        "kernels": sorted(set(accelerator.kernels.chosen().values())),
        "values": accelerator.to_host(tensor).tolist(),
        "read": accelerator.read_host(flat),
        "used": used,
        "capacity": memory.stats().capacity.value,
        "draws_again": torch.equal(torch.rand(2, device=accelerator.device).to("cpu"), drawn),
    }
    with accelerator.streams.lane("gather"):
        report["recorded"] = accelerator.streams.record().done()
    accelerator.streams.boundary()
    accelerator.clock()
    report["synchronized"] = len(sys.modules["tpu_opening"].synchronized)  # the package imported its own copy
    memory.release(tensor)
    report["left"] = memory.stats().used.value
    accelerator.close()
    return report


if __name__ == "__main__":
    print(json.dumps(main()))
