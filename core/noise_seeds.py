"""Seeds of the noise by which moments of 16 bits are rounded.

[Note: noise] The noise is a hash of a seed and of an element's place in its source: AdamW's region, which is laid out
alike on any number of ranks and at any stage, or the parameter that Muon updates. The seed holds the configuration's
seed, the source's name and the parameter's count of updates, which a checkpoint restores: the bits depend on neither
the number of ranks, nor the stage, nor where a run was interrupted.
"""

from __future__ import annotations

import zlib

from windlass.core.plan import Plan

_COUNT_BITS = 32  # of the seed of noise; the run and the source have the 31 above them


def make_noise_seed(plan: Plan, source: str) -> int:
    """The seed of a source, by its name, to which the count of updates is added. Names may meet in one seed, which does
    no harm: noise is drawn for each element by its place."""
    run, own = zlib.crc32(str(plan.noise_seed).encode()), zlib.crc32(source.encode())
    return ((run + own) % (1 << 31)) << _COUNT_BITS
