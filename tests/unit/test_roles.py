"""Roles follow from modules and their places: what Muon is for, and what it must leave alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from windlass.core.roles import Role, find_roles
from windlass.models import GPT, ModelShape

BYTES = 256


class Attention(nn.Module):
    """Grouped queries: 8 heads of queries, 2 of keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        head = width // 8
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, 2 * head, bias=False)
        self.v_proj = nn.Linear(width, 2 * head, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.sinks = nn.Parameter(torch.zeros(8))


class Gated(nn.Module):
    """Up, gate and down, in the order in which Llama defines them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)


class Stacked(nn.Module):
    """Experts as one parameter for each matrix."""

    def __init__(self, experts: int, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(experts, 2 * inner, width))
        self.down = nn.Parameter(torch.zeros(experts, width, inner))
        self.down_bias = nn.Parameter(torch.zeros(experts, width))


class Gate(nn.Module):
    """A router in a module of its own."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, experts, bias=False)


class Mixture(nn.Module):
    def __init__(self, router: nn.Module, experts: nn.Module, width: int) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = Gated(width, 3 * width)
        self.shared_gate = nn.Linear(width, 1, bias=False)


class Decoder(nn.Module):
    """Embedding, blocks, norm, head."""

    def __init__(self, *blocks: nn.Module, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)


def named(module: nn.Module, role: Role) -> set[str]:
    return {name for name, found in find_roles(module).items() if found is role}


@pytest.mark.parametrize("layers", [1, 3])
def test_a_matrix_in_a_block_is_no_head_although_it_has_a_row_for_each_token(layers: int) -> None:
    shape = ModelShape("bytes", width=64, layers=layers, heads=4, sequence_length=64)  # up: 4 * 64 = 256 = bytes
    model = GPT(shape)
    assert named(model, Role.HEAD) == {"head.weight"}
    matrices = ("query_key_value", "attention_projection", "up", "down")
    assert named(model, Role.MATRIX) == {f"blocks.{n}.{name}.weight" for n in range(layers) for name in matrices}
    assert named(model, Role.EMBEDDING) == {"token_embedding.weight", "position_embedding.weight"}


@pytest.mark.parametrize(
    "body",
    [
        nn.TransformerEncoderLayer(64, 4, 256),
        Gated(64, 256),
        nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)),
    ],
)
def test_a_single_block_holds_no_head_either(body: nn.Module) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(BYTES, 64), "body": body, "head": nn.Linear(64, BYTES)})
    assert named(model, Role.HEAD) == {"head.weight"}


def test_blocks_that_are_attributes_are_repeated_too() -> None:
    model = Decoder()
    model.first, model.second = (nn.Sequential(nn.LayerNorm(64), nn.Linear(64, BYTES)) for _ in range(2))
    assert named(model, Role.HEAD) == {"head.weight"}
    assert named(model, Role.MATRIX) == {"first.1.weight", "second.1.weight"}


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11)), {"1.weight"}),
        (nn.Sequential(nn.Embedding(11, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 11))), {"1.1.weight"}),
        (nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), {"3.weight"}),
        (nn.ModuleList([nn.Embedding(11, 4), nn.Linear(4, 11), nn.Linear(4, 11)]), {"1.weight", "2.weight"}),
        (nn.Linear(4, 11), set()),
    ],
)
def test_heads_stand_outside_of_blocks(model: nn.Module, heads: set[str]) -> None:
    assert named(model, Role.HEAD) == heads


def tied_by_name(embedding_first: bool) -> nn.Module:
    pair = [("embedding", nn.Embedding(BYTES, 64)), ("head", nn.Linear(64, BYTES, bias=False))]
    model = nn.ModuleDict(dict(pair if embedding_first else pair[::-1]))
    model["head"].weight = model["embedding"].weight
    return model


@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_tied_pair_is_embedding_and_head(embedding_first: bool) -> None:
    expected = {"embedding.weight": Role.EMBEDDING, "head.weight": Role.HEAD}
    assert find_roles(tied_by_name(embedding_first)) == expected


def test_what_is_tied_to_an_embedding_is_no_matrix_even_in_a_block() -> None:
    linear = nn.Linear(64, BYTES, bias=False)
    model = Decoder(nn.Sequential(linear))
    linear.weight = model.embedding.weight
    assert find_roles(model)["blocks.0.0.weight"] is Role.HEAD


def test_grouped_queries_are_matrices() -> None:
    model = Decoder(*(Attention(64) for _ in range(2)))
    expected = {f"blocks.{n}.{name}_proj.weight" for n in range(2) for name in "qkvo"}
    assert named(model, Role.MATRIX) == expected
    assert named(model, Role.OTHER) == {"blocks.0.sinks", "blocks.1.sinks"}


@pytest.mark.parametrize(
    ("arguments", "matrices"),
    [
        ({}, {"in_proj_weight", "out_proj.weight"}),
        ({"kdim": 6, "vdim": 5}, {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"}),
        ({"add_bias_kv": True}, {"in_proj_weight", "out_proj.weight"}),
    ],
)
def test_attention_of_torch(arguments: dict[str, int], matrices: set[str]) -> None:
    model = nn.Sequential(nn.Embedding(16, 16), nn.MultiheadAttention(16, 2, **arguments))
    assert {name.removeprefix("1.") for name in named(model, Role.MATRIX)} == matrices  # 16 rows make no head of it
    assert named(model, Role.BIAS) == {"1.in_proj_bias", "1.out_proj.bias"}
    assert not named(model, Role.EXPERTS)


ROUTERS: dict[str, Callable[[], nn.Module]] = {
    "router.weight": lambda: nn.Linear(64, 8, bias=False),
    "router.linear.weight": lambda: Gate(64, 8),
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("kind", ["one parameter", "modules", "named modules"])
def test_experts_and_their_router(router: str, kind: str) -> None:
    experts: nn.Module = Stacked(8, 64, 32)
    if kind == "modules":
        experts = nn.ModuleList(Gated(64, 32) for _ in range(8))
    elif kind == "named modules":
        experts = nn.ModuleDict({f"expert_{n}": Gated(64, 32) for n in range(8)})
    model = Decoder(*(Mixture(ROUTERS[router](), experts, 64) for _ in range(2)))
    assert named(model, Role.ROUTER) == {f"blocks.{n}.{router}" for n in range(2)}
    stacks = {f"blocks.{n}.experts.{name}" for n in range(2) for name in ("gate_up", "down")}
    assert named(model, Role.EXPERTS) == (stacks if kind == "one parameter" else set())
    shared = {f"blocks.{n}.shared.w{k}.weight" for n in range(2) for k in (1, 2, 3)}
    assert shared <= named(model, Role.MATRIX)
    assert find_roles(model)["blocks.0.shared_gate.weight"] is Role.OTHER  # one row: a vector
    assert (kind == "one parameter") == ("blocks.0.experts.down_bias" in named(model, Role.OTHER))


def test_experts_with_as_many_outputs_as_there_are_experts_are_no_routers() -> None:
    model = Mixture(nn.Linear(64, 8), nn.ModuleList(nn.Linear(64, 8) for _ in range(8)), 64)
    assert named(model, Role.ROUTER) == {"router.weight"}


def test_what_is_three_dimensional_and_no_stack_of_experts() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.zeros(1, 8, 8))
            self.scales = nn.Parameter(torch.zeros(8, 1, 8))
            self.stack = nn.ParameterList([nn.Parameter(torch.zeros(2, 3, 4))])

    model = nn.ModuleList([Holder(), nn.Bilinear(4, 5, 6), nn.Conv1d(4, 4, 3)])
    assert named(model, Role.EXPERTS) == {"0.stack.0"}
    assert named(model, Role.CONV) == {"2.weight"}
    assert named(model, Role.OTHER) == {"0.positions", "0.scales", "1.weight"}


class LoraLinear(nn.Module):
    """As the libraries do it: the base layer and the factors are children, the factors by the adapter's name."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(width, width)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(width, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, width, bias=False)})


class LoraWeights(nn.Linear):
    """As by hand: the factors are parameters of the layer itself."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__(width, width)
        self.lora_A = nn.Parameter(torch.zeros(rank, width))
        self.lora_B = nn.Parameter(torch.zeros(width, rank))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input @ self.lora_A.mT @ self.lora_B.mT


def test_low_rank_factors_are_adapters_beside_what_they_adapt() -> None:
    model = nn.ModuleList([LoraLinear(8, 2), LoraWeights(8, 2)])
    factors = {"0.lora_A.default.weight", "0.lora_B.default.weight", "1.lora_A", "1.lora_B"}
    assert named(model, Role.ADAPTER) == factors
    assert named(model, Role.MATRIX) == {"0.base_layer.weight", "1.weight"}


def test_factors_that_stand_alone_are_what_they_are() -> None:
    alone = nn.ModuleDict({"lora_A": nn.Linear(8, 2), "lora_B": nn.Linear(2, 8)})
    half = nn.ModuleDict({"lora_A": nn.Linear(8, 2), "base": nn.Linear(8, 8)})
    for model in (alone, half):
        assert len(named(model, Role.MATRIX)) == 2


@pytest.mark.parametrize(
    ("layer", "role"),
    [
        (nn.Conv2d(3, 8, 3), Role.CONV),
        (nn.ConvTranspose2d(3, 8, 3), Role.CONV),
        (nn.Conv2d(8, 8, 3, groups=2), Role.CONV),
        (nn.Conv1d(8, 8, 4, groups=8), Role.OTHER),  # depthwise: a vector for each channel
        (nn.Conv1d(8, 1, 3), Role.OTHER),
        (nn.Linear(8, 1), Role.OTHER),
        (nn.Linear(1, 8), Role.OTHER),
        (nn.LSTM(4, 4), Role.OTHER),
        (nn.GRUCell(4, 4), Role.OTHER),
        (nn.EmbeddingBag(5, 4), Role.EMBEDDING),
        (nn.BatchNorm2d(4), Role.NORM),
        (nn.GroupNorm(2, 4), Role.NORM),
    ],
)
def test_layers_of_torch(layer: nn.Module, role: Role) -> None:
    first, _ = next(iter(layer.named_parameters()))
    assert find_roles(layer)[first] is role


def test_a_module_under_two_names_has_both() -> None:
    layer = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": layer, "two": layer})
    assert set(find_roles(model)) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert named(model, Role.MATRIX) == {"one.weight", "two.weight"}


def test_parts_of_a_parametrized_weight_are_nothing_that_is_known() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 16, 3)), nn.Linear(16, 16))
    parts = {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"}
    assert named(model, Role.OTHER) == parts
    assert named(model, Role.MATRIX) == {"1.weight"}
