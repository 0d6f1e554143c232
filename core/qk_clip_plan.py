"""What a plan says about QK-clip: which rows of which parameters belong to which head. Plain data, and its making."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import nn

from windlass.core.qk_probe import HeadRows, QKProbe, find_probes
from windlass.core.specs import ParamSpec

Side = Literal["query", "key", "query_alone"]
_Declared = tuple[Side, HeadRows, ParamSpec]


@dataclass(frozen=True)
class ClippedRows:
    """Head i has the `rows` rows of a parameter from `first + i * step` on."""

    parameter: str  # the name that owns the bytes
    side: Side
    heads: int
    rows: int
    first: int
    step: int


@dataclass(frozen=True)
class ClippedAttention:
    """One probe: its module, its attribute there, and the rows that it declares."""

    path: str
    attribute: str
    heads: int
    key_heads: int
    rows: tuple[ClippedRows, ...]


@dataclass(frozen=True)
class QKClipPlan:
    """Attentions in the order in which their maxima lie in the vector that ranks exchange: those with equal numbers of
    heads beside each other."""

    threshold: float
    attentions: tuple[ClippedAttention, ...]

    @property
    def heads(self) -> int:
        """Of all attentions: what ranks exchange has so many elements."""
        return sum(one.heads for one in self.attentions)


def plan_qk_clip(module: nn.Module, specs: Sequence[ParamSpec], threshold: float) -> QKClipPlan:
    """Read the probes of a model. Raises ValueError if there is none, or one does not fit the parameters."""
    by_name = {spec.name: spec for spec in specs}
    found = []
    for path, attribute, probe in find_probes(module):
        declared = tuple(_find_declared(path, probe, by_name))
        if _are_trained(path, declared):
            rows = tuple(_describe(path, probe, *one) for one in declared)
            found.append(ClippedAttention(path, attribute, probe.heads, probe.key_heads, rows))
    if not found:
        raise ValueError(
            "muon.qk_clip is on, but no module of the model that is trained has a windlass.functional.QKProbe; keep "
            "one in an attribute of each attention module and give it to windlass.functional.attention, or leave "
            "muon.qk_clip out"
        )
    _require_apart(found)
    found.sort(key=lambda one: (one.heads, one.key_heads))
    return QKClipPlan(threshold, tuple(found))


def _find_declared(path: str, probe: QKProbe, specs: Mapping[str, ParamSpec]) -> Iterator[_Declared]:
    """What the probe declares, and the biases beside it."""
    sides: tuple[tuple[Side, tuple[HeadRows, ...]], ...] = (
        ("query", probe.query),
        ("key", probe.key),
        ("query_alone", probe.query_alone),
    )
    for side, rows in ((side, rows) for side, many in sides for rows in many):
        name = f"{path}.{rows.name}" if path else rows.name
        if name not in specs:
            raise ValueError(
                f"the QKProbe of module {path!r} declares {rows.name!r}, which is no parameter of that module; names "
                "are those of its named_parameters(), as 'query.weight'"
            )
        spec = _owner(specs[name], specs)
        yield side, rows, spec
        bias = specs.get(name.removesuffix("weight") + "bias") if name.endswith("weight") else None
        if bias is not None and bias.shape == spec.shape[:1]:
            yield side, rows, _owner(bias, specs)


def _owner(spec: ParamSpec, specs: Mapping[str, ParamSpec]) -> ParamSpec:
    return spec if spec.tied_to is None else specs[spec.tied_to]


def _are_trained(path: str, declared: Sequence[_Declared]) -> bool:
    """Weights that nobody trains are left as they are; an attention with some of them cannot be clipped."""
    frozen = [spec.name for _, _, spec in declared if not spec.trainable]
    if 0 < len(frozen) < len(declared):
        raise ValueError(
            f"the QKProbe of module {path!r} declares {frozen[0]!r}, which is not trained, beside parameters that are, "
            "so muon.qk_clip cannot scale all of its heads; train all of them or none, or leave muon.qk_clip out"
        )
    return not frozen


def _describe(path: str, probe: QKProbe, side: Side, declared: HeadRows, spec: ParamSpec) -> ClippedRows:
    heads = probe.key_heads if side == "key" else probe.heads
    last = declared.first + (heads - 1) * declared.step + declared.rows
    height = spec.shape[0] if spec.shape else 0
    if declared.rows < 1 or declared.first < 0 or declared.step < declared.rows or last > height:
        raise ValueError(
            f"the QKProbe of module {path!r} declares {heads} heads of {declared.rows} rows, one every {declared.step} "
            f"from row {declared.first} on, in {spec.name!r} of shape {list(spec.shape)}, wanted heads that lie apart "
            f"inside its {height} rows; mend the numbers of its HeadRows"
        )
    return ClippedRows(spec.name, side, heads, declared.rows, declared.first, declared.step)


def _require_apart(attentions: Sequence[ClippedAttention]) -> None:
    """No row may be scaled twice: its logits would shrink by the product."""
    spans: dict[str, list[tuple[int, int, str]]] = defaultdict(list)  # first and past-last row, and who declares them
    for attention in attentions:
        for one in attention.rows:
            starts = (one.first + head * one.step for head in range(one.heads))
            spans[one.parameter] += [(start, start + one.rows, attention.path) for start in starts]
    for parameter, found in spans.items():
        for (_, stop, path), (start, _, other) in pairwise(sorted(found)):
            if start < stop:
                raise ValueError(
                    f"row {start} of {parameter!r} is declared twice, by the QKProbes of modules {path!r} and "
                    f"{other!r}; muon.qk_clip can scale it for one only, and the bias beside a weight goes with it "
                    "unasked"
                )
