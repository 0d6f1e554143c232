"""The collectives in the graph for real: replicas of XLA's CPU client in one process, compared with plain torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from in_graph_worlds import Ranks

HERE = Path(__file__).resolve().parent
WORLDS = {
    "two": ((0, 1),),
    "four": ((0, 1, 2, 3),),
    "halves": ((0, 1), (2, 3)),
    "strides": ((0, 2), (1, 3)),
    "backwards": ((3, 1, 2, 0),),
}
# A replica that waits for the others holds a thread of torch_xla's pool, which otherwise has one per core.
_THREADS = {"XLA_THREAD_POOL_SIZE": "16"}
_BITS = (0x80000000, 0x7F800000, 0x7FC00001, 0x00000001, 0x3F800000)  # -0, an infinity, a NaN, a subnormal, 1


@dataclass(frozen=True)
class Ran:
    """One run of all collectives in a world."""

    groups: tuple[Ranks, ...]
    inputs: list[dict[str, list[float]]]  # by rank
    report: dict[str, Any]

    def output(self, rank: int, name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor(self.report["outputs"][rank][name], dtype=torch.uint8).view(dtype)

    def given(self, rank: int, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(self.inputs[rank][name], dtype=dtype)


@cache
def _run(world: str, tokens: str) -> Ran:
    groups = WORLDS[world]
    size = len(groups[0])
    inputs = []
    for rank in range(size * len(groups)):
        generator = torch.Generator().manual_seed(rank)
        wide = torch.randn(256 * size, generator=generator)
        wide[0] = float("inf")  # an overflow in the first element that every collective sees
        inputs.append(
            {
                "wide": wide.tolist(),
                "narrow": torch.randn(6 * size, generator=generator).bfloat16().tolist(),
                "bits": [bits - 2**32 if bits >= 2**31 else bits for bits in _BITS],
                "splits": _split(groups, rank),
            }
        )
    command = [sys.executable, "-W", "error", str(HERE / "in_graph_replicas.py")]
    variables = {**os.environ, "PYTHONPATH": str(HERE.parent), "DISABLE_NUMERIC_CC_TOKEN": tokens} | _THREADS
    asked = json.dumps({"groups": groups, "inputs": inputs})
    done = subprocess.run(command, input=asked, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return Ran(groups, inputs, json.loads(done.stdout))


def _split(groups: tuple[Ranks, ...], rank: int) -> list[float]:
    """Uneven splits of 4 elements per rank that fit together: index i sends 1 to the next, 7 to the one after that in
    a ring of four, 3 and 5 in a ring of two, and 4 to each of the others."""
    ranks = next(ranks for ranks in groups if rank in ranks)
    size, mine = len(ranks), ranks.index(rank)
    by_distance = {2: [3, 5], 4: [4, 1, 7, 4]}[size]
    sent = [by_distance[(index - mine) % size] for index in range(size)]
    received = [by_distance[(mine - index) % size] for index in range(size)]
    return [float(split) for split in (*sent, *received)]


each_world = pytest.mark.parametrize("world", WORLDS)


def _each_rank(world: str) -> list[tuple[Ran, int, Ranks, int]]:
    ran = _run(world, "1")
    return [(ran, rank, ranks, ranks.index(rank)) for ranks in ran.groups for rank in ranks]


@each_world
def test_replicas_compile_one_program(world: str) -> None:
    report = _run(world, "1").report
    assert (report["hashes"], report["compiled"]) == (1, 1)


@each_world
@pytest.mark.parametrize(
    ("name", "given", "dtype"),
    [("sum", "wide", torch.float32), ("sum of bfloat16 in float32", "narrow", torch.float32)],
)
def test_sums_are_those_of_the_parts(world: str, name: str, given: str, dtype: torch.dtype) -> None:
    for ran, rank, ranks, index in _each_rank(world):
        terms = torch.stack([ran.given(other, given).chunk(len(ranks))[index] for other in ranks])
        wanted = terms.to(torch.float64).sum(0)
        # fp32 sums of four terms in any order: within three roundings of the largest partial sum
        bound = 3 * 2.0**-24 * float(terms[:, 1:].to(torch.float64).abs().sum(0).max())
        torch.testing.assert_close(ran.output(rank, name, dtype).double(), wanted, rtol=0, atol=bound)


@each_world
def test_sums_of_bfloat16_are_rounded_once(world: str) -> None:
    for ran, rank, ranks, index in _each_rank(world):
        terms = torch.stack([ran.given(other, "narrow").chunk(len(ranks))[index] for other in ranks])
        wanted = terms.to(torch.float64).sum(0).to(torch.bfloat16)  # fp32 holds the sum of so few short terms exactly
        assert torch.equal(ran.output(rank, "sum of bfloat16", torch.bfloat16), wanted)


@each_world
def test_the_largest_is_found(world: str) -> None:
    for ran, rank, ranks, index in _each_rank(world):
        terms = torch.stack([ran.given(other, "wide").chunk(len(ranks))[index] for other in ranks])
        assert torch.equal(ran.output(rank, "max", torch.float32), terms.amax(0))


@each_world
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("gathered bits", lambda ran, rank: ran.given(rank, "bits", torch.int32)),
        ("gathered bfloat16", lambda ran, rank: ran.given(rank, "narrow").bfloat16()),
        ("gathered int64", lambda ran, rank: ran.given(rank, "bits", torch.int64)),
        ("gathered uint8", lambda ran, rank: ran.given(rank, "bits", torch.int32)),
        ("gathered register", lambda ran, rank: ran.given(rank, "wide")[:256]),
    ],
)
def test_gathered_parts_are_in_the_groups_order_to_the_bit(
    world: str, name: str, read: Callable[[Ran, int], Tensor]
) -> None:
    for ran, rank, ranks, _ in _each_rank(world):
        wanted = torch.cat([read(ran, other) for other in ranks]).view(torch.uint8)
        assert torch.equal(ran.output(rank, name, torch.uint8), wanted)


@each_world
def test_all_ranks_have_the_same_reduced_vector(world: str) -> None:
    for ran, rank, ranks, _ in _each_rank(world):
        terms = torch.stack([ran.given(other, "wide")[:3] for other in ranks])
        total = ran.output(rank, "all sum", torch.float32)
        torch.testing.assert_close(total.double(), terms.double().sum(0), rtol=0, atol=1e-6)
        assert torch.equal(total, ran.output(ranks[0], "all sum", torch.float32))
        assert torch.equal(ran.output(rank, "all max", torch.float32), terms.amax(0))


@each_world
def test_a_broadcast_is_the_last_ranks_tensor(world: str) -> None:
    for ran, rank, ranks, _ in _each_rank(world):
        for numel in (1, 7, 256 * len(ranks)):
            wanted = ran.given(ranks[-1], "wide")[:numel]
            assert torch.equal(ran.output(rank, f"broadcast {numel}", torch.float32), wanted)


@each_world
def test_uneven_parts_arrive_in_order(world: str) -> None:
    for ran, rank, ranks, index in _each_rank(world):
        wanted = []
        for other in ranks:
            sent = ran.given(other, "wide")[: 4 * len(ranks)]
            splits = [int(split) for split in ran.inputs[other]["splits"][: len(ranks)]]
            wanted.append(sent.split(splits)[index])
        assert torch.equal(ran.output(rank, "exchanged", torch.float32), torch.cat(wanted))


def test_an_infinity_stays_where_it_is_with_tokens_too() -> None:
    """torch_xla's numeric tokens carry a first element's infinity into what comes later, unless they start anew."""
    with_tokens, without = _run("two", "0"), _run("two", "1")
    assert with_tokens.report["hashes"] == 1
    for rank in range(len(without.inputs)):
        for name in ("gathered register", "broadcast 7", "exchanged", "all sum"):
            got, wanted = (ran.output(rank, name, torch.float32) for ran in (with_tokens, without))
            assert not bool(wanted.isnan().any())
            assert torch.equal(got, wanted)
