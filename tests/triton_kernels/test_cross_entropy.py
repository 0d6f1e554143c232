"""linear_cross_entropy in Triton beyond what the suite asks: its memory, its products, and fp16's small numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from windlass.backends.triton import cross_entropy
from windlass.backends.triton.cross_entropy import BLOCKS, PADDING, linear_cross_entropy

IGNORED = -100


def make_layer(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=random).to(dtype)
    weight = (torch.randn(vocabulary, width, generator=random) / width**0.5).to(dtype)
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=random)


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most that tensors take while it runs, beyond what was there, as torch's profiler counts it."""
    function()  # whatever is made once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    del kept
    assert profiler.profiler is not None
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    used = most = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        used += event.nbytes()
        most = max(most, used)
    return most


@pytest.mark.parametrize("vocabulary", [1, 63, 64, 65, 1024, 1025, 4096, 4097, 9001])
def test_vocabularies_about_the_blocks(vocabulary: int) -> None:
    hidden, weight, targets = make_layer(4, 6, vocabulary)
    targets[0], targets[3] = vocabulary - 1, 0
    wide = [one.double().requires_grad_() for one in (hidden, weight)]
    wanted = F.cross_entropy(wide[0] @ wide[1].mT, targets, reduction="none")
    wanted.sum().backward()
    losses, *gradients = linear_cross_entropy(hidden, weight, targets, chunk=3)
    assert (losses.double() - wanted).abs().max() < 1e-5
    for found, exact in zip(gradients, wide, strict=True):
        assert found is not None
        assert exact.grad is not None
        assert (found.double() - exact.grad).abs().max() < 1e-5


def test_memory_is_what_the_docstring_says() -> None:
    tokens, width, vocabulary, chunk = 48, 40, 1000, 8
    hidden, weight, targets = make_layer(tokens, width, vocabulary)
    results = 4 * (tokens + tokens * width + vocabulary * width)
    found = peak_bytes(lambda: linear_cross_entropy(hidden, weight, targets, chunk=chunk))
    padded = -(-vocabulary // PADDING) * PADDING
    assert abs(found - results - 4 * chunk * padded) < 2000


def test_memory_in_16_bits_is_what_the_docstring_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 16 bits that are added in fp32 are not for the host; what they would take on a device is nothing."""
    monkeypatch.setattr(cross_entropy, "_add_product", lambda total, *_: total)
    tokens, width, vocabulary = 24, 40, 8192
    hidden, weight, targets = make_layer(tokens, width, vocabulary, torch.bfloat16)
    results = 4 * tokens + 2 * (tokens * width + vocabulary * width)
    for chunk, sums in ((8, 2 * vocabulary * width), (tokens, 0)):
        wanted = results + 2 * chunk * vocabulary + 4 * chunk * width + sums
        found = peak_bytes(functools.partial(linear_cross_entropy, hidden, weight, targets, chunk=chunk))
        assert found == pytest.approx(wanted, rel=0.03)  # torch's product of 16 bits on the host takes some


def test_it_takes_an_eighth_of_what_torch_takes() -> None:
    tokens, width, vocabulary = 128, 16, 2048
    hidden, weight, targets = make_layer(tokens, width, vocabulary)
    parameters = [one.requires_grad_() for one in (hidden.clone(), weight.clone())]

    def train_plainly() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(F.linear(*parameters), targets), parameters)

    results = 4 * (tokens * width + vocabulary * width)
    plain = peak_bytes(train_plainly) - results
    fused = peak_bytes(lambda: linear_cross_entropy(hidden, weight, targets, chunk=8)) - results
    assert fused * 8 <= plain, f"{fused} bytes, where torch takes {plain}"


def test_sums_are_rounded_to_16_bits_where_they_lie() -> None:
    for rows in (1, 2, 3, 64, 1000):
        total = torch.randn(rows, 24, generator=torch.Generator().manual_seed(rows))
        wanted, memory = total.bfloat16(), total.untyped_storage().data_ptr()
        narrow = cross_entropy._narrow_in_place(total, torch.bfloat16)
        assert torch.equal(narrow, wanted)
        assert narrow.is_contiguous()
        assert narrow.data_ptr() == memory


def test_fp16_keeps_what_is_small() -> None:
    """All classes but one have a softmax near 2^-32, which fp16 does not have."""
    hidden, weight = torch.zeros(2, 16, dtype=torch.float16), torch.zeros(4096, 16, dtype=torch.float16)
    hidden[:, 0], weight[0, 0] = 4.0, 5.5  # logits of 22 and 0
    wide = weight.double().requires_grad_()
    targets = torch.zeros(2, dtype=torch.int64)
    F.cross_entropy(hidden.double() @ wide.mT, targets, reduction="sum").backward()
    _, _, found = linear_cross_entropy(hidden, weight, targets)
    assert found is not None
    assert wide.grad is not None
    assert found.dtype is torch.float32
    wanted = wide.grad[1:, 0]
    assert (wanted < 2.0**-28).all()
    assert ((found[1:, 0].double() - wanted).abs() < 0.01 * wanted).all()


def test_ignored_tokens_are_not_looked_at() -> None:
    hidden, weight, targets = make_layer(6, 8, 20)
    hidden[2], targets[2] = float("nan"), IGNORED
    losses, back, _ = linear_cross_entropy(hidden, weight, targets, weight_gradient=False)
    assert back is not None
    assert losses.isfinite().all()
    assert losses[2] == 0
    assert not back[2].any()


def test_the_same_arguments_give_the_same_bits() -> None:
    layer = make_layer(12, 8, max(BLOCKS) + 5)
    for one, other in zip(linear_cross_entropy(*layer), linear_cross_entropy(*layer), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(20, 8, dtype=torch.bfloat16)}, "wanted .* of one dtype of 16 bits or float32"),
        ({"weight": torch.zeros(20, 9)}, "cast and flatten them first"),
        ({"hidden": torch.zeros(2, 3, 8)}, r"got hidden as torch.float32\[2, 3, 8\]"),
        ({"targets": torch.zeros(6, dtype=torch.int32)}, r"got targets as torch.int32\[6\]"),
        (
            {"targets": torch.zeros(12, dtype=torch.int64)[::2]},
            r"with strides \(2,\), wanted contiguous torch.int64\[6\]",
        ),
        ({"scales": torch.zeros(5)}, r"got scales as torch.float32\[5\]"),
        ({"chunk": 0}, "got chunk 0, wanted 1 token at a time or more"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    hidden, weight, targets = make_layer(6, 8, 20)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**({"hidden": hidden, "weight": weight, "targets": targets} | change))
