"""The built-in GPT: its sizes, its arithmetic, and what the engine relies on."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from windlass.models import GPT, SHAPES, Block, ModelShape, build_model, find_shape
from windlass.muon_groups import declared_views

SMALL = ModelShape("test", width=32, layers=2, heads=4, sequence_length=16, vocabulary=64)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(SMALL)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # (12 width^2 + 4 width) per layer, two embeddings, a norm, a head: by hand from the shapes in the docstring.
        ("nano", 5 * (12 * 128**2 + 4 * 128) + (256 + 128) * 128 + 2 * 128 + 256 * 128),
        ("tiny", 6 * (12 * 384**2 + 4 * 384) + (256 + 128) * 384 + 2 * 384 + 256 * 384),
        ("small", 8 * (12 * 512**2 + 4 * 512) + (256 + 256) * 512 + 2 * 512 + 256 * 512),
        # GPT-2 as published has 124,439,808, of which 12 x 3 x 768 are biases of q, k and v.
        ("gpt2", 124_439_808 - 12 * 3 * 768),
    ],
)
def test_parameter_counts(name: str, expected: int) -> None:
    with torch.device("meta"):
        built = build_model(name)
    assert sum(parameter.numel() for parameter in built.parameters()) == expected
    assert SHAPES[name].num_parameters == expected


def test_sizes_are_what_their_names_promise() -> None:
    millions = {name: shape.num_parameters / 1e6 for name, shape in SHAPES.items()}
    assert millions == pytest.approx({"nano": 1.07, "tiny": 10.9, "small": 25.6, "gpt2": 124.4}, rel=0.01)


def test_small_with_8192_tokens_is_the_peers_model() -> None:
    shape = dataclasses.replace(SHAPES["small"], vocabulary=8192)
    # two embeddings, eight blocks of four bias-free matrices and two norms, a norm, an untied head
    assert shape.num_parameters == (8192 + 256) * 512 + 8 * (12 * 512**2 + 4 * 512) + 2 * 512 + 8192 * 512 == 33_702_912


def test_unknown_size_is_refused_with_a_hint() -> None:
    with pytest.raises(ValueError, match=r"no model named 'tyni', the models are nano, tiny, .*did you mean 'tiny'\?"):
        find_shape("tyni")


def test_width_must_divide_by_heads() -> None:
    with pytest.raises(ValueError, match="width 30 does not divide by its 4 heads"):
        dataclasses.replace(SMALL, width=30)


def test_loss_is_the_mean_negative_log_likelihood_in_fp32(model: GPT) -> None:
    ids, targets = torch.randint(0, 64, (2, 3, 16))
    logits = model(ids)
    assert logits.shape == (3, 16, 64)
    expected = -logits.double().log_softmax(-1).gather(-1, targets[..., None]).mean()
    torch.testing.assert_close(model(ids, targets).double(), expected, rtol=1e-6, atol=0)
    assert model.bfloat16()(ids, targets).dtype is torch.float32


def test_untrained_loss_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    ids, targets = torch.randint(0, 256, (2, 4, 128))
    assert build_model("nano")(ids, targets).item() == pytest.approx(math.log(256), abs=0.05)


def test_a_later_token_changes_no_earlier_output(model: GPT) -> None:
    ids = torch.randint(0, 64, (1, 16))
    changed = ids.clone()
    changed[0, 10] = (ids[0, 10] + 1) % 64
    before, after = model(ids), model(changed)
    torch.testing.assert_close(after[:, :10], before[:, :10], rtol=0, atol=1e-6)
    assert not torch.allclose(after[:, 10:], before[:, 10:])


def test_attention_equals_its_definition(model: GPT) -> None:
    block = model.blocks[0]
    assert isinstance(block, Block)
    x = torch.randn(2, 16, 32)
    packed = block.query_key_value(block.attention_norm(x)).double()
    query, key, value = (part.view(2, 16, 4, 8).transpose(1, 2) for part in packed.split(32, dim=-1))
    scores = query @ key.mT / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), -math.inf)
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(2, 16, 32).float()
    middle = x + block.attention_projection(mixed)
    expected = middle + block.down(nn.functional.gelu(block.up(block.mlp_norm(middle)), approximate="tanh"))
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_declared_matrices_are_query_key_and_value(model: GPT) -> None:
    """Without the rows of the first, every logit is 0: each token then takes the mean of the values so far."""
    views = declared_views(model)
    assert views == {f"blocks.{index}.query_key_value.weight": (32, 32, 32) for index in range(2)}
    block = model.blocks[0]
    assert isinstance(block, Block)
    queries, _, values = block.query_key_value.weight.data.split(views["blocks.0.query_key_value.weight"])
    queries.zero_()
    x = torch.randn(2, 16, 32)
    seen = (block.attention_norm(x) @ values.T).cumsum(1) / torch.arange(1, 17)[:, None]
    middle = x + block.attention_projection(seen)
    expected = middle + block.down(nn.functional.gelu(block.up(block.mlp_norm(middle)), approximate="tanh"))
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)


def test_too_long_a_sequence_is_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match="at most 16 tokens per sequence, got 17"):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_every_parameter_gets_a_gradient(model: GPT) -> None:
    ids, targets = torch.randint(0, 64, (2, 8, 16))
    model(ids, targets).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.norm() < 1e-6]
    assert silent == []  # a bias on the keys would be here: softmax cancels it


def test_tied_head_is_the_embedding() -> None:
    tied = GPT(dataclasses.replace(SMALL, tied=True, bias=True))
    assert tied.head.weight is tied.token_embedding.weight
    assert "head.weight" not in dict(tied.named_parameters())
    biases = [name for name, _ in tied.named_parameters() if name.endswith(".bias") and "norm" not in name]
    assert {name.split(".")[2] for name in biases} == {"attention_projection", "up", "down"}


def test_meta_model_starts_as_a_real_one() -> None:
    """Filling in modules in order draws the same numbers as building them does."""
    with torch.device("meta"):
        empty = GPT(SMALL)
    assert all(parameter.is_meta for parameter in empty.parameters())
    torch.manual_seed(0)
    expected = GPT(SMALL).state_dict()
    torch.manual_seed(0)
    empty.to_empty(device="cpu")
    for module in empty.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.reset_parameters()  # type: ignore[operator]
    assert {name: bool((value == expected[name]).all()) for name, value in empty.state_dict().items()} == dict.fromkeys(
        expected, True
    )


def test_children_are_embeddings_blocks_norm_and_head(model: GPT) -> None:
    kinds = {name: type(child).__name__ for name, child in model.named_children()}
    assert kinds == {
        "token_embedding": "Embedding",
        "position_embedding": "Embedding",
        "blocks": "ModuleList",
        "norm": "LayerNorm",
        "head": "Linear",
    }
