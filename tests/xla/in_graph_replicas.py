"""A program: run the collectives in the graph on several replicas of XLA's CPU client, and print what came out as JSON.

One thread plays all ranks: it builds the program of each on a device of its own, then starts one after the other. The
first is compiled, the others find it in the cache, if it is the same; each waits for the others on a thread of XLA.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from in_graph_worlds import Ranks, make_transport
from windlass.accelerator.interface import ReduceOp
from windlass.backends.cpu.transport import Call
from windlass.backends.xla.in_graph import InGraphTransport

Upload = Callable[[Tensor], Tensor]


def use_everything(transport: InGraphTransport, inputs: dict[str, list[float]], upload: Upload) -> dict[str, Tensor]:
    """Every collective on this rank, in one program; `inputs` are what its tests look at."""
    size, results = transport.group.size, {}

    def reduce_scatter(tag: str, given: str, asked: torch.dtype, op: ReduceOp) -> Tensor:
        input = upload(torch.tensor(inputs[given]) if given == "wide" else torch.tensor(inputs[given]).bfloat16())
        output = upload(torch.zeros(input.numel() // size, dtype=asked))
        transport.reduce_scatter(output, input, op, Call("reduce_scatter", tag, input.nbytes, input.dtype, asked, op))
        return output

    results["sum"] = reduce_scatter("sum", "wide", torch.float32, "sum")
    results["max"] = reduce_scatter("max", "wide", torch.float32, "max")
    results["sum of bfloat16 in float32"] = reduce_scatter("a", "narrow", torch.float32, "sum")
    results["sum of bfloat16"] = reduce_scatter("b", "narrow", torch.bfloat16, "sum")

    bits = torch.tensor(inputs["bits"], dtype=torch.int32)
    for name, part in {
        "gathered bits": bits.view(torch.float32),
        "gathered bfloat16": torch.tensor(inputs["narrow"]).bfloat16(),
        "gathered int64": torch.tensor(inputs["bits"], dtype=torch.int64),
        "gathered uint8": torch.tensor(inputs["bits"], dtype=torch.int32).view(torch.uint8),
        "gathered register": torch.tensor(inputs["wide"])[:256],
    }.items():
        results[name] = upload(torch.zeros(size * part.numel(), dtype=part.dtype))
        transport.all_gather(results[name], upload(part), Call("all_gather", name, part.nbytes, part.dtype))

    for op, name in (("sum", "all sum"), ("max", "all max")):
        results[name] = upload(torch.tensor(inputs["wide"])[:3])
        transport.all_reduce(
            results[name],
            "max" if op == "max" else "sum",
            Call("all_reduce", name, 12, torch.float32, op=op),
        )
    for numel in (1, 7, 256 * size):
        results[f"broadcast {numel}"] = upload(torch.tensor(inputs["wide"])[:numel])
        call = Call("broadcast", "w", 4 * numel, torch.float32, source=size - 1)
        transport.broadcast(results[f"broadcast {numel}"], size - 1, call)
    sent = torch.tensor(inputs["wide"])[: 4 * size]
    results["exchanged"] = upload(torch.zeros(4 * size))
    splits = inputs["splits"]
    transport.all_to_all(
        results["exchanged"],
        upload(sent),
        [int(split) for split in splits[size:]],
        [int(split) for split in splits[:size]],
        Call("all_to_all", "m", -1, torch.float32),
    )
    return results


def _upload_to(device: str) -> Upload:
    return lambda tensor: tensor.to(device)


def main(groups: Sequence[Ranks], inputs: Sequence[dict[str, list[float]]]) -> dict[str, object]:
    os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(len(inputs)), "XLA_ALWAYS_ALLREDUCE": "1"}
    import torch_xla
    import torch_xla.core.xla_model as model
    import torch_xla.debug.metrics as metrics

    devices = model.get_xla_supported_devices()
    model.set_replication(devices[0], devices)
    everything = []
    for rank, device in enumerate(devices):
        torch_xla._XLAC._xla_set_default_device(device)
        ranks = next(ranks for ranks in groups if rank in ranks)
        rows = [[int(split) for split in inputs[other]["splits"]] for other in ranks]
        transport = make_transport(groups, rank, rows)
        everything.append(use_everything(transport, inputs[rank], _upload_to(device)))
    hashes = {bytes(torch_xla._XLAC._get_graph_hash(list(results.values()))).hex() for results in everything}
    metrics.clear_all()
    for device in devices:
        torch_xla._XLAC._xla_set_default_device(device)
        torch_xla.sync()
    outputs = [{name: result.to("cpu") for name, result in results.items()} for results in everything]
    return {
        "hashes": len(hashes),
        "compiled": metrics.counter_value("UncachedCompile"),
        "outputs": [{name: one.view(torch.uint8).tolist() for name, one in results.items()} for results in outputs],
    }


if __name__ == "__main__":
    asked = json.loads(sys.stdin.read())
    print(json.dumps(main([tuple(ranks) for ranks in asked["groups"]], asked["inputs"])))
