"""Seeds of the noise by which moments of 16 bits are rounded.

[Note: noise] The noise is a hash of a seed and of an element's place in its source: the region, or, where a region's
layout depends on the number of ranks, the parameter. The seed holds the run's seed, the source and the parameter's
count of updates, all of which a checkpoint restores: the bits depend on neither the number of ranks, nor the stage, nor
where a run was interrupted.
"""

from __future__ import annotations

import zlib

from windlass.core.plan import Plan

_COUNT_BITS = 32  # of the seed of noise; the region has the 31 above them


def make_noise_seed(plan: Plan, source: int) -> int:
    """The seed of a source, to which the count of updates is added; sources with different numbers below 2**31 have
    different ones."""
    run = zlib.crc32(str(plan.noise_seed).encode())
    return ((run + source) % (1 << 31)) << _COUNT_BITS
