"""QK-clip without a device: the largest logits, what modules may declare, factors, and where heads lie in shards."""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from windlass.attention import find_largest_logits
from windlass.config import ConfigError, load_config
from windlass.core.qk_clip import AlikeAttentions, Windows, cut_windows, find_factors
from windlass.core.qk_clip_plan import QKClipPlan, plan_qk_clip
from windlass.core.specs import describe_model
from windlass.functional import HeadRows, QKProbe, attention
from windlass.models import GPT, Block, ModelShape


def make_tensors(*shape: int, key_heads: int, keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    *batch, _, _, size = shape
    pair = [torch.randn(*batch, key_heads, keys, size, generator=random).to(dtype) for _ in range(2)]
    return torch.randn(*shape, generator=random).to(dtype), *pair


def largest_by_hand(query: Tensor, key: Tensor, causal: bool, mask: Tensor | None, scale: float | None) -> Tensor:
    """Logit by logit, in double precision."""
    heads, queries, size = query.shape[-3:]
    per_key, keys = heads // key.shape[-3], key.shape[-2]
    allowed = torch.ones(*query.shape[:-1], keys, dtype=torch.bool) if mask is None else mask
    allowed = allowed.expand(*query.shape[:-1], keys)
    found = [-math.inf] * heads
    for place in torch.cartesian_prod(*map(torch.arange, (*query.shape[:-1], keys))).tolist():
        *batch, head, i, j = place
        if allowed[tuple(place)] and not (causal and j > i):
            left, right = query[(*batch, head, i)].double(), key[(*batch, head // per_key, j)].double()
            found[head] = max(found[head], float(left @ right) * (size**-0.5 if scale is None else scale))
    assert queries > 0
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(("at_a_time", "rows"), [(1, 1), (150, 2), (300, 3), (2**24, 256)])
@pytest.mark.parametrize(
    ("shape", "key_heads", "keys", "causal", "scale"),
    [
        ((2, 4, 5, 8), 4, 5, True, None),
        ((2, 4, 5, 8), 2, 7, False, 0.3),
        ((4, 7, 8), 1, 3, True, None),  # queries beyond the last key
        ((4, 3, 8), 1, 7, True, -0.5),
        ((2, 2, 6, 3, 4), 3, 3, False, None),
    ],
)
def test_the_largest_logits_are_those_of_all_pairs(
    shape: tuple[int, ...], key_heads: int, keys: int, causal: bool, scale: float | None, at_a_time: int, rows: int
) -> None:
    query, key, _ = make_tensors(*shape, key_heads=key_heads, keys=keys)
    found = find_largest_logits(query, key, causal=causal, scale=scale, at_a_time=at_a_time, rows=rows)
    torch.testing.assert_close(found.double(), largest_by_hand(query, key, causal, None, scale), rtol=1e-6, atol=1e-6)
    assert found.dtype is torch.float32


def test_masked_logits_are_left_out_and_a_head_without_any_has_none() -> None:
    query, key, _ = make_tensors(2, 4, 5, 8, key_heads=4, keys=5)
    mask = torch.rand(4, 5, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[2] = False
    found = find_largest_logits(query, key, mask=mask, at_a_time=150, rows=2)
    wanted = largest_by_hand(query, key, False, mask, None)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    assert found[2] == -math.inf


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)], ids=str)
def test_logits_of_16_bits_neither_overflow_nor_lose_more_than_rounding(dtype: torch.dtype, unit: float) -> None:
    query, key, _ = make_tensors(2, 4, 5, 8, key_heads=4, keys=5, dtype=dtype)
    query = query * 300
    key = key * 300
    found = find_largest_logits(query, key, causal=True)
    wanted = largest_by_hand(query, key, True, None, None)
    assert float(wanted.max()) > 65504
    torch.testing.assert_close(found.double(), wanted, rtol=8 * unit, atol=0)


@pytest.mark.parametrize("listens", [False, True])
def test_attention_is_that_of_torch_to_the_bit(listens: bool) -> None:
    results = []
    for ours in (True, False):
        query, key, value = (one.requires_grad_() for one in make_tensors(2, 4, 5, 8, key_heads=2, keys=5))
        probe = QKProbe(HeadRows("q", 1), HeadRows("k", 1), heads=4, key_heads=2)
        probe.listens = listens
        if ours:
            output = attention(query, key, value, probe, causal=True, scale=0.3)
        else:
            output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
        output.pow(2).sum().backward()
        results.append((output, query.grad, key.grad, value.grad))
        if ours and listens:
            wanted = largest_by_hand(query.detach(), key.detach(), True, None, 0.3)
            assert probe.maxima is not None
            torch.testing.assert_close(probe.maxima.double(), wanted, rtol=1e-6, atol=1e-6)
        elif ours:
            assert probe.maxima is None
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_only_passes_that_have_a_backward_count() -> None:
    query, key, value = (one.requires_grad_() for one in make_tensors(1, 2, 3, 4, key_heads=2, keys=3))
    probe = QKProbe(HeadRows("q", 1), HeadRows("k", 1), heads=2)
    probe.listens = True
    with torch.no_grad():
        attention(query, key, value, probe)
    output = attention(query, key, value, probe)
    before = probe.maxima
    assert before is None
    output.sum().backward()
    first = find_largest_logits(query, key)
    assert probe.maxima is not None
    assert torch.equal(probe.maxima, first)
    probe.observe(torch.tensor([-9.0, 9.0]))
    assert torch.equal(probe.maxima, torch.maximum(first, torch.tensor([-9.0, 9.0])))


def test_a_pass_that_ends_after_the_engine_is_told_to_nobody() -> None:
    query, key, value = (one.requires_grad_() for one in make_tensors(1, 2, 3, 4, key_heads=2, keys=3))
    probe = QKProbe(HeadRows("q", 1), HeadRows("k", 1), heads=2)
    probe.listens = True
    late = attention(query, key, value, probe)
    probe.listens = False
    late.sum().backward()
    assert probe.maxima is None


def test_what_does_not_fit_the_probe_is_refused() -> None:
    query, key, value = (one.requires_grad_() for one in make_tensors(1, 4, 3, 4, key_heads=2, keys=3))
    probe = QKProbe(HeadRows("q", 1), HeadRows("k", 1), heads=4)
    probe.listens = True
    with pytest.raises(ValueError, match="4 heads and keys of 2 for a probe of 4 and 4"):
        attention(query, key, value, probe)
    with pytest.raises(ValueError, match=r"maxima of shape \[3\], wanted \[4\]"):
        probe.observe(torch.zeros(3))
    with pytest.raises(ValueError, match="wanted bool"):
        attention(query, key, value, mask=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="4 heads and 3 key heads"):
        QKProbe(HeadRows("q", 1), HeadRows("k", 1), heads=4, key_heads=3)


def test_copies_of_a_probe_declare_the_same_and_listen_to_nobody() -> None:
    probe = QKProbe(HeadRows("q", 2, stride=3), HeadRows("k", 2), heads=4, key_heads=2, query_alone=HeadRows("q", 1, 2))
    probe.listens = True
    probe.observe(torch.zeros(4))
    for other in (copy.deepcopy(probe), pickle.loads(pickle.dumps(probe))):
        assert (other.heads, other.key_heads) == (4, 2)
        assert (other.query, other.key, other.query_alone) == (probe.query, probe.key, probe.query_alone)
        assert not other.listens
        assert other.maxima is None


class Attention(nn.Module):
    """Two heads of two rows."""

    def __init__(self, query: HeadRows | None = None, key: HeadRows | None = None) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(3, 4), nn.Linear(3, 4)
        self.qk = QKProbe(query or HeadRows("query.weight", 2), key or HeadRows("key.weight", 2), heads=2)


def plan_of(model: nn.Module) -> QKClipPlan:
    return plan_qk_clip(model, describe_model(model)[0], 100.0)


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (nn.Linear(2, 2), "no module of the model that is trained has a windlass.functional.QKProbe"),
        (Attention(HeadRows("querry.weight", 2)), "'querry.weight', which is no parameter of that module"),
        (Attention(HeadRows("query.weight", 3)), r"2 heads of 3 rows, one every 3 from row 0 on, .* of shape \[4, 3\]"),
        (Attention(HeadRows("query.weight", 2, stride=1)), "wanted heads that lie apart inside its 4 rows"),
        (Attention(key=HeadRows("query.weight", 2)), "row 0 of '0.query.weight' is declared twice"),
    ],
)
def test_declarations_that_do_not_fit_are_refused(module: nn.Module, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plan_of(nn.Sequential(module, nn.Linear(2, 2)))


def test_an_attention_that_is_not_trained_is_left_alone_and_half_of_one_refused() -> None:
    half = Attention()
    model = nn.Sequential(Attention().requires_grad_(False), half)
    plan = plan_of(model)
    assert [one.path for one in plan.attentions] == ["1"]
    names = {(one.parameter, one.side) for one in plan.attentions[0].rows}
    assert names == {(f"1.{side}.{leaf}", side) for side in ("query", "key") for leaf in ("weight", "bias")}
    half.key.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"declares '1\.key\.bias', which is not trained"):
        plan_of(model)


def test_factors_are_those_of_the_rule() -> None:
    """The product of a query's and its key's factor is gamma; no weight grows; one head for each key: square roots."""
    tau = 100.0
    maxima = torch.tensor([50.0, 400.0, 1600.0, 100.0, 400.0, 1600.0, -math.inf, math.inf, math.nan, 101.0])
    kinds = [AlikeAttentions(1, 4, 2), AlikeAttentions(1, 6, 6)]
    one, query, key, alone, *rest = find_factors(maxima, torch.tensor(True), tau, kinds).split([1, 4, 2, 4, 6, 6, 6])
    gammas = [float(min(Fraction(1), Fraction(100) / Fraction(value))) for value in (50, 400, 1600, 100)]
    assert one.tolist() == [1.0]
    assert alone.tolist() == gammas == [1.0, 0.25, 0.0625, 1.0]
    assert key.tolist() == [1.0, 1.0]  # a head that needs nothing shares each key
    assert query.tolist() == gammas
    gammas = [0.25, 0.0625, 1.0, 1.0, 1.0, 100 / 101]
    for side in rest[:2]:
        assert side.tolist() == pytest.approx([math.sqrt(gamma) for gamma in gammas], rel=1e-7)
    assert rest[2].tolist() == pytest.approx(gammas, rel=1e-7)
    shared = find_factors(torch.tensor([400.0, 1600.0]), torch.tensor(True), tau, [AlikeAttentions(1, 2, 1)])
    assert shared.tolist() == pytest.approx([1.0, 0.5, 0.125, 0.5, 0.25, 0.0625])
    assert find_factors(maxima, torch.tensor(False), tau, kinds).tolist() == [1.0] * 29


def test_heads_are_found_in_every_shard() -> None:
    """Every shard writes the factors' numbers to its heads; together that is what one shard of all would be."""
    windows = [Windows(3, 4, 4, 5, 1), Windows(30, 3, 7, 4, 6)]
    whole = [0] * 64
    for one in windows:
        for index in range(one.count):
            for element in range(one.width):
                whole[one.start + index * one.step + element] = one.first + index
    for size in (1, 2, 5, 16, 64):
        pieces = []
        for first in range(0, 64, size):
            shard = torch.zeros(min(size, 64 - first), dtype=torch.int64)
            for one in cut_windows(windows, first, first + len(shard)):
                one.of(shard).copy_(torch.arange(one.first, one.first + one.count).unsqueeze(1))
            pieces.append(shard)
        assert torch.cat(pieces).tolist() == whole, size


def test_the_option_is_a_bound_above_0() -> None:
    muon = {"optimizer": {"type": "Muon"}}
    assert load_config(muon, num_ranks=1).muon.qk_clip is None
    assert load_config({**muon, "muon": {"qk_clip": 100}}, num_ranks=1).muon.qk_clip == 100.0
    for wrong in (0, -1.0, "100", math.inf):
        with pytest.raises(ConfigError, match="qk_clip"):
            load_config({**muon, "muon": {"qk_clip": wrong}}, num_ranks=1)


def test_the_gpt_declares_its_heads() -> None:
    """Scaling the declared rows of one head scales that head's logits, and no other's."""
    model = GPT(ModelShape("test", width=16, layers=2, heads=4, sequence_length=8))
    plan = plan_of(model)
    assert [one.path for one in plan.attentions] == ["blocks.0", "blocks.1"]
    block = model.blocks[1]
    assert isinstance(block, Block)
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def find_maxima() -> Tensor:
        block.probe.forget()
        block.probe.listens = True
        block(x).sum().backward()
        assert block.probe.maxima is not None
        return block.probe.maxima

    before = find_maxima()
    with torch.no_grad():
        for rows in plan.attentions[1].rows:
            start = rows.first + 2 * rows.step
            model.get_parameter(rows.parameter)[start : start + rows.rows] *= 3
    torch.testing.assert_close(find_maxima(), before * torch.tensor([1.0, 1.0, 9.0, 1.0]))
