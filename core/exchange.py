"""Small facts exchanged between ranks, derived once above the collectives: JSON values, and agreement on a plan."""

from __future__ import annotations

import json
import struct
from typing import Any

import torch

from windlass.accelerator.interface import Accelerator, Group
from windlass.core.plan import Plan


def gather_json(accelerator: Accelerator, group: Group, value: Any, *, tag: str = "exchange") -> list[Any]:
    """Every rank's JSON-ready `value`, in rank order, on every rank. A collective."""
    data = json.dumps(value).encode()
    collectives, device = accelerator.collectives, accelerator.device
    lengths = torch.empty(group.size, dtype=torch.int64, device=device)
    mine = torch.tensor([len(data)], dtype=torch.int64, device=device)
    collectives.all_gather(lengths, mine, group, tag=tag).wait()
    sizes = struct.unpack(f"<{group.size}q", accelerator.to_bytes(lengths))
    longest = max(sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    everyone = torch.empty(group.size * longest, dtype=torch.uint8, device=device)
    collectives.all_gather(everyone, padded.to(device), group, tag=tag).wait()
    received = accelerator.to_bytes(everyone)
    return [json.loads(received[rank * longest : rank * longest + size]) for rank, size in enumerate(sizes)]


def require_same_plan(plan: Plan, accelerator: Accelerator, group: Group) -> None:
    """Raise ValueError on every rank, naming the first difference, unless all ranks made the same plan."""
    hashes = gather_json(accelerator, group, plan.hash, tag="plan hash")
    if len(set(hashes)) == 1:
        return
    prints = gather_json(accelerator, group, plan.fingerprint(), tag="plan fingerprint")
    for rank, other in enumerate(prints):
        names = [*prints[0], *[name for name in other if name not in prints[0]]]
        for name in names:
            if prints[0].get(name) != other.get(name):
                raise ValueError(
                    f"the ranks made different plans: rank 0 and rank {rank} differ in {name}; give every rank the "
                    "same model and the same configuration"
                )
    raise ValueError("the ranks made different plans; give every rank the same model and the same configuration")
