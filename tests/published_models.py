"""Shapes of published models as specs, for plans that nobody trains here."""

from __future__ import annotations

from collections.abc import Sequence

from windlass.core.specs import ParamSpec, Role, UnitSpec

Model = tuple[list[ParamSpec], list[UnitSpec]]


def make_decoder(
    layers: int, width: int, matrices: Sequence[tuple[str, int, int]], vocabulary: int, views: tuple[int, ...] = ()
) -> Model:
    """Blocks of these (name, rows, columns) and a norm, between an embedding and a head. `views` splits "qkv"."""
    specs = [ParamSpec("embedding", (vocabulary, width), "bfloat16", Role.EMBEDDING, "embedding")]
    for layer in range(layers):
        unit = f"blocks.{layer}"
        for name, rows, columns in matrices:
            splits = views if name == "qkv" else ()
            specs.append(
                ParamSpec(
                    f"{unit}.{name}", (rows, columns), "bfloat16", Role.MATRIX, unit, algorithm="muon", views=splits
                )
            )
        specs.append(ParamSpec(f"{unit}.norm", (width,), "bfloat16", Role.NORM, unit))
    specs.append(ParamSpec("head", (vocabulary, width), "bfloat16", Role.HEAD, "head"))
    names = dict.fromkeys(spec.unit for spec in specs)
    return specs, [UnitSpec(name, (name,), False) for name in names]


def make_llama(layers: int, width: int, of_query: int, of_key: int, hidden: int, vocabulary: int) -> Model:
    """Grouped-query attention and a gated MLP, each projection by itself."""
    matrices = [
        ("q", of_query, width),
        ("k", of_key, width),
        ("v", of_key, width),
        ("o", width, of_query),
        ("gate", hidden, width),
        ("up", hidden, width),
        ("down", width, hidden),
    ]
    return make_decoder(layers, width, matrices, vocabulary)


def make_gpt(layers: int, width: int, vocabulary: int, *, split: bool = False) -> Model:
    """Fused query, key and value, and an MLP four times as wide."""
    matrices = [("qkv", 3 * width, width), ("o", width, width), ("up", 4 * width, width), ("down", width, 4 * width)]
    return make_decoder(layers, width, matrices, vocabulary, (width,) * 3 if split else ())


def make_mixture(layers: int, width: int, experts: int, hidden: int) -> Model:
    """Attention and stacks of experts."""
    specs, units = make_decoder(layers, width, [("q", width, width), ("o", width, width)], 1024)
    for layer in range(layers):
        unit = f"blocks.{layer}"
        for name, rows, columns in (("gate", hidden, width), ("down", width, hidden)):
            shape = (experts, rows, columns)
            specs.append(ParamSpec(f"{unit}.{name}", shape, "bfloat16", Role.EXPERTS, unit, algorithm="muon"))
    return specs, units


LLAMA_8B = (32, 4096, 4096, 1024, 14336, 128256)
LLAMA_70B = (80, 8192, 8192, 1024, 28672, 128256)
QWEN3_600M = (28, 1024, 2048, 1024, 3072, 151936)
GPT2 = (12, 768, 50257)
GPT_30M = (8, 512, 8192)
