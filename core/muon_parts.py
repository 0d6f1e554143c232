"""Which elements of a region share a kernel call where every rank runs one program.

Where every shard holds the same kinds of elements at the same places, a part is a slice. Elsewhere a part is the whole
shard, and a mask, which is data, says which elements it is for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from windlass.core.kernel_results import keep_results
from windlass.core.plan import Region
from windlass.core.state import ModelState, Ranges

Kind = tuple[int, Hashable]
"""Parameter group, and what else tells kernel calls apart."""
Found = tuple[int, int, Kind | None]
"""Elements [start, stop) of a region and their kind; None: to be left alone."""
Vectors = list[Tensor | None]


@dataclass(frozen=True)
class Part:
    """Elements [start, stop) of what a rank holds of a region, of one kind; of them those in `ranges`, if not None."""

    start: int
    stop: int
    kind: Kind | None
    ranges: Ranges | None = None  # of the whole region


def cut_alike(found: Sequence[Found], held: int) -> list[Part] | None:
    """Slices of a shard of `held` elements that hold one kind each on every rank; what is found nowhere, which is
    padding, goes with what precedes it. None if ranks differ."""
    pieces: list[Found] = []
    for start, stop, kind in found:
        for rank in range(start // held, -(-stop // held)):
            first, end = max(start - rank * held, 0), min(stop - rank * held, held)
            if first < end:
                pieces.append((first, end, kind))
    bounds = sorted({0, held, *(one[0] for one in pieces), *(one[1] for one in pieces)})
    kinds: dict[int, Kind | None] = {}  # by the bound that elements of one kind begin at
    for start, stop, kind in pieces:
        for index in range(bisect_left(bounds, start), bisect_left(bounds, stop)):
            if kinds.setdefault(index, kind) != kind:
                return None
    parts: list[Part] = []
    for index, stop in enumerate(bounds[1:]):
        if parts and (index not in kinds or kinds[index] == parts[-1].kind):
            parts[-1] = Part(parts[-1].start, stop, parts[-1].kind)
        else:
            parts.append(Part(bounds[index], stop, kinds.get(index)))
    return parts


def mask_apart(found: Sequence[Found], held: int) -> list[Part]:
    """A part of the whole shard for each kind, in order of first appearance in the region; without a mask if there is
    one kind only."""
    ranges: dict[Kind | None, list[tuple[int, int]]] = {}
    for start, stop, kind in found:
        ranges.setdefault(kind, []).append((start, stop))
    if len(ranges) == 1:
        return [Part(0, held, next(iter(ranges)))]
    return [Part(0, held, kind, tuple(own)) for kind, own in ranges.items() if kind is not None]


def run_parts(
    state: ModelState,
    region: Region,
    use: str,
    parts: Sequence[Part],
    vectors: Sequence[Tensor | None],
    written: Sequence[int],
    call: Callable[[int, Vectors], Sequence[Tensor | None]],
) -> None:
    """Write into `vectors[i]` for each i in `written` what `call(index of the part, its vectors)` makes of it, in that
    order. `use` tells masks of one region apart."""
    own = [vectors[index] for index in written]
    if parts and parts[0].ranges is not None:
        masks = state.masks(region, use, [part.ranges for part in parts if part.ranges is not None])
        chosen = own
        for index, mask in enumerate(masks):
            after = call(index, _copy(vectors, written))
            chosen = [_choose(mask, one, other) for one, other in zip(after, chosen, strict=True)]
        results: Sequence[Tensor | None] = chosen
    elif len(parts) == 1:
        results = own if parts[0].kind is None else call(0, list(vectors))
    else:
        pieces = []
        for index, part in enumerate(parts):
            here = [None if one is None else one[part.start : part.stop] for one in vectors]
            apart = [here[number] for number in written]
            pieces.append(apart if part.kind is None else call(index, _copy(here, written)))
        results = [_join(same) for same in zip(*pieces, strict=True)]
    keep_results(own, results)


def _copy(vectors: Sequence[Tensor | None], written: Sequence[int]) -> Vectors:
    """What a kernel writes must not be what others still read."""
    return [one.clone() if one is not None and index in written else one for index, one in enumerate(vectors)]


def _choose(mask: Tensor, after: Tensor | None, before: Tensor | None) -> Tensor | None:
    return None if after is None or before is None else torch.where(mask, after, before)


def _join(pieces: Sequence[Tensor | None]) -> Tensor | None:
    present = [piece for piece in pieces if piece is not None]
    return torch.cat(present) if present else None
