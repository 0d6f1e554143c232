"""What ranks do in the tests of shards that are published late."""

from __future__ import annotations

import time
from typing import Final

import torch

from windlass.conformance.collective_values import blank, draw
from windlass.conformance.opening import opened

_LATE_SECONDS: Final = 0.05


def publish_late() -> None:
    """Each rank in turn writes its shard late; whoever fetches after publishing finds it written."""
    size = 1001
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        shard = blank(accelerator, size, torch.float32, "shared whole")
        for late in world.ranks:
            shards = [draw(other, size, torch.float32, late) for other in world.ranks]
            output = blank(accelerator, size * world.size, torch.float32)
            if world.rank == late:
                time.sleep(_LATE_SECONDS)
            shard.tensor.copy_(shards[world.rank])
            collectives.publish(world)
            collectives.fetch(output.tensor, shard.tensor, world, tag="weights").wait()
            output.expect(torch.cat(shards), "rank", late, "is late")
            collectives.barrier(world)
            output.release()
        shard.release()
