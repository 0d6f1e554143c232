"""QK-clip: after an update, shrink the query and key rows of heads whose attention logits grew beyond a threshold
(Kimi K2, Moonshot AI 2025, section 2.1).

[Note: factors] A head's factor is gamma = threshold / its largest logit of the step, over all micro-batches and ranks,
where that is beyond the threshold, else 1. The paper scales queries and keys by sqrt(gamma) each, and by gamma the
queries of keys that all heads share (the rotary part of multi-head latent attention). Where some query heads share a
key head, the key takes sqrt of the largest gamma among them, and each query the rest of its own: logits of every head
shrink by exactly its gamma, no weight grows, a head that needs nothing is left as it is, and with one query head for
each key head that is the paper's rule. A rotation or a bias after the projections changes nothing about it, a norm of
queries and keys undoes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from windlass.core.captured import Issuer
from windlass.core.plan import Region
from windlass.core.qk_clip_plan import ClippedAttention, ClippedRows
from windlass.core.qk_probe import QKProbe
from windlass.core.state import ModelState

ALPHA = 0.5
"""The queries take gamma**ALPHA, the keys the rest."""
TAG = "qk clip"


@dataclass(frozen=True)
class AlikeAttentions:
    """Attentions with equal numbers of heads, whose maxima lie beside each other."""

    count: int
    heads: int
    key_heads: int


@dataclass(frozen=True)
class Windows:
    """`count` runs of `width` elements, one every `step` from `start` on; run i goes with factor `first + i`."""

    start: int
    width: int
    step: int
    count: int
    first: int

    def of(self, flat: Tensor) -> Tensor:
        """[count, width], aliasing."""
        return flat[self.start : self.start + (self.count - 1) * self.step + self.width].unfold(
            0, self.width, self.step
        )


class QKClip:
    """One executor's. Probes listen from its making to `close`."""

    def __init__(self, state: ModelState, issuer: Issuer) -> None:
        assert state.plan.muon is not None
        assert state.plan.muon.qk_clip is not None
        self._state = state
        self._plan = state.plan.muon.qk_clip
        self._issuer = issuer
        self._probes = [_find_probe(state, one) for one in self._plan.attentions]
        shapes = [(one.heads, one.key_heads) for one in self._plan.attentions]
        self._kinds = [AlikeAttentions(len(list(alike)), *shape) for shape, alike in groupby(shapes)]
        windows = self._find_windows()
        self._regions = [region for region in state.plan.regions if region.name in windows]
        self._windows: dict[str, tuple[Windows, ...]] = {}  # inside the owned part, by region
        self._indices: dict[str, Tensor] = {}  # of the factor of each owned element, where programs are uniform
        for region in self._regions:
            own = tuple(cut_windows(windows[region.name], *state.owned_bounds(region)))
            if state.plan.rules.program == "uniform":
                self._indices[region.name] = self._make_index(region, own)
            else:
                self._windows[region.name] = own
        for probe in self._probes:
            probe.listens = True

    def require_fed(self, touched: Collection[str]) -> None:
        """Raise RuntimeError if queries have gradients of passes that their probe knows nothing of."""
        for probe, one in zip(self._probes, self._plan.attentions, strict=True):
            if probe.maxima is None and any(r.parameter in touched for r in one.rows if r.side != "key"):
                raise RuntimeError(
                    f"muon.qk_clip is on and the queries of module {one.path!r} have gradients, but no logits were "
                    f"observed; give {one.attribute!r} to windlass.functional.attention, or call its observe"
                )

    def apply(self, keep: Tensor) -> None:
        """Scale what this rank owns; nothing changes unless `keep` [] bool. A collective."""
        device, state = self._state.accelerator.device, self._state
        seen = [
            torch.full((probe.heads,), -torch.inf, dtype=torch.float32, device=device)
            if probe.maxima is None
            else probe.maxima
            for probe in self._probes
        ]
        maxima = torch.cat(seen)
        state.accelerator.collectives.all_reduce(maxima, state.group, op="max", tag=TAG).wait()
        tensors = [self._issuer.keep("qk maxima", maxima), self._issuer.keep("keep", keep)]
        structure = []
        for region in self._regions:
            if self._indices or self._windows[region.name]:
                given = [state.owned_fp32(region), state.owned_low(region), self._indices.get(region.name)]
                structure.append((region.name, given[1] is not None))
                tensors += [one for one in given if one is not None]
        self._issuer.run(TAG, self._issue, tuple(structure), tensors)

    def forget(self) -> None:
        """Drop the maxima observed so far."""
        for probe in self._probes:
            probe.forget()

    def close(self) -> None:
        """Nobody listens to the probes any more."""
        for probe in self._probes:
            probe.listens = False
        self.forget()
        self._indices.clear()

    def _issue(self, structure: tuple[tuple[str, bool], ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        """A function of its tensors, into which it writes; it may be captured."""
        supply = iter(tensors)
        factors = find_factors(next(supply), next(supply), self._plan.threshold, self._kinds)
        for name, has_low in structure:
            weight = next(supply)
            low = next(supply) if has_low else None
            if self._indices:
                weight.mul_(factors.index_select(0, next(supply)))
                if low is not None:
                    low.copy_(weight)
                continue
            for windows in self._windows[name]:
                scaled = windows.of(weight).mul_(factors[windows.first : windows.first + windows.count].unsqueeze(1))
                if low is not None:
                    windows.of(low).copy_(scaled)
        return []

    # -- where the heads lie -----------------------------------------------------------------------------------

    def _find_windows(self) -> dict[str, list[Windows]]:
        """The heads' elements, in elements of whole regions, by region."""
        found: dict[str, list[Windows]] = {}
        first, attentions = 1, iter(self._plan.attentions)
        for kind in self._kinds:
            for place in range(kind.count):
                starts = {
                    "query": first + place * kind.heads,
                    "key": first + kind.count * kind.heads + place * kind.key_heads,
                    "query_alone": first + kind.count * (kind.heads + kind.key_heads) + place * kind.heads,
                }
                for rows in next(attentions).rows:
                    region, window = self._locate(rows, starts[rows.side])
                    found.setdefault(region.name, []).append(window)
            first += kind.count * (2 * kind.heads + kind.key_heads)
        return found

    def _locate(self, rows: ClippedRows, first: int) -> tuple[Region, Windows]:
        region, placement = self._state.plan.placement_by_name[rows.parameter]
        size = placement.numel // placement.shape[0]  # elements of a row
        start = placement.start + rows.first * size
        return region, Windows(start, rows.rows * size, rows.step * size, rows.heads, first)

    def _make_index(self, region: Region, own: Sequence[Windows]) -> Tensor:
        """[elements owned] int32: data and no offsets, so that it is no part of the program."""
        first, stop = self._state.owned_bounds(region)
        index = torch.zeros(stop - first, dtype=torch.int32)
        for windows in own:
            numbers = torch.arange(windows.first, windows.first + windows.count, dtype=torch.int32)
            windows.of(index).copy_(numbers.unsqueeze(1))
        return index.to(self._state.accelerator.device)


def find_factors(maxima: Tensor, keep: Tensor, threshold: float, kinds: Sequence[AlikeAttentions]) -> Tensor:
    """1, then for each kind [count, ...] the factors of queries, of keys, and of queries whose keys are shared."""
    beyond = keep & (maxima > threshold) & torch.isfinite(maxima)
    gammas = torch.where(beyond, threshold / maxima, torch.ones_like(maxima))
    table = [torch.ones_like(maxima[:1])]
    first = 0
    for kind in kinds:
        stop = first + kind.count * kind.heads
        gamma = gammas[first:stop].view(kind.count, kind.key_heads, kind.heads // kind.key_heads)
        key = gamma.amax(-1, keepdim=True) ** (1 - ALPHA)
        table += [(gamma / key).reshape(-1), key.reshape(-1), gamma.reshape(-1)]
        first = stop
    return torch.cat(table)


def cut_windows(windows: Sequence[Windows], first: int, stop: int) -> Iterator[Windows]:
    """What lies in [first, stop), counted from there: whole runs together, those that are cut one by one."""
    for one in windows:
        whole: list[int] = []
        for index in range(one.count):
            start = one.start + index * one.step
            left, right = max(start, first), min(start + one.width, stop)
            if right - left == one.width:
                whole.append(index)
            elif left < right:
                yield Windows(left - first, right - left, right - left, 1, one.first + index)
        if whole:
            start = one.start + whole[0] * one.step - first
            yield Windows(start, one.width, one.step, len(whole), one.first + whole[0])


def _find_probe(state: ModelState, one: ClippedAttention) -> QKProbe:
    probe = getattr(state.module.get_submodule(one.path), one.attribute)
    assert isinstance(probe, QKProbe)
    return probe
