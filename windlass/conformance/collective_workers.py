"""What ranks do in the tests of collectives that move and reduce; each compares with plain arithmetic on the host."""

from __future__ import annotations

import itertools
import math
from typing import Final

import torch

from windlass.accelerator.interface import ReduceOp
from windlass.conformance.collective_values import (
    PLACINGS,
    SIZES,
    add_in_rank_order,
    blank,
    check_reduced,
    draw,
    one_program,
    part,
    place,
    to_dtype,
    to_dtypes,
    untouched,
)
from windlass.conformance.opening import opened

FP32: Final = torch.float32
OPS: Final[tuple[ReduceOp, ...]] = ("sum", "max")


def gather(dtype_name: str) -> None:
    """all_gather of every size, out of and into every kind of memory."""
    with opened() as accelerator:
        world = accelerator.collectives.world
        for dtype, size in itertools.product(to_dtypes(dtype_name), SIZES):
            wanted = torch.cat([draw(other, size, dtype) for other in range(world.size)])
            mine = draw(world.rank, size, dtype)
            for placing in PLACINGS:
                shard, output = place(accelerator, mine, placing), blank(accelerator, size * world.size, dtype, placing)
                accelerator.collectives.all_gather(output.tensor, shard.tensor, world, tag="apart").wait()
                output.expect(wanted, dtype, size, placing)
                shard.expect(mine, "the input of", dtype, size, placing)
                shard.release()
                output.release()


def gather_in_place(dtype_name: str) -> None:
    """all_gather whose input is this rank's part of the output."""
    dtype = to_dtype(dtype_name)
    with opened() as accelerator:
        world = accelerator.collectives.world
        for size in SIZES:
            wanted = torch.cat([draw(other, size, dtype) for other in range(world.size)])
            start = torch.full((size * world.size,), untouched(dtype), dtype=dtype, device="cpu")
            part(start, world.rank, world.size).copy_(draw(world.rank, size, dtype))
            for placing in PLACINGS:
                whole = place(accelerator, start, placing)
                output = whole.tensor
                accelerator.collectives.all_gather(output, part(output, world.rank, world.size), world).wait()
                whole.expect(wanted, size, placing)
                whole.release()


def reduce_scatter(source_name: str, target_name: str) -> None:
    """reduce_scatter of every size, out of and into every kind of memory, also in place where the dtypes allow it and
    a rank may cut its own part."""
    source, target = to_dtype(source_name), to_dtype(target_name)
    with opened() as accelerator:
        world = accelerator.collectives.world
        for size in SIZES:
            inputs = [draw(other, size * world.size, source) for other in range(world.size)]
            terms = [part(one, world.rank, world.size) for one in inputs]
            mine = inputs[world.rank]
            for op, placing in itertools.product(OPS, PLACINGS):
                given, output = place(accelerator, mine, placing), blank(accelerator, size, target, placing)
                accelerator.collectives.reduce_scatter(output.tensor, given.tensor, world, op=op, tag="apart").wait()
                check_reduced(output.read(), terms, op, op, size, placing)
                given.expect(mine, "the input of", size, placing)
                if source == target and not one_program(accelerator):
                    whole = given.tensor
                    own = part(whole, world.rank, world.size)
                    accelerator.collectives.reduce_scatter(own, whole, world, op=op, tag="in place").wait()
                    check_reduced(part(given.read(), world.rank, world.size), terms, op, op, size, placing, "in place")
                given.release()
                output.release()


def reduce_in_order(source_name: str) -> list[str]:
    """reduce_scatter into fp32 in one piece and in buckets, and all_reduce: which are not, to the bit, the sum in rank
    order. Each rank says so and goes on, for what a backend does not declare must not break its ranks."""
    dtype = to_dtype(source_name)
    wrong = []
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        for size in SIZES:
            inputs = [draw(other, size * world.size, dtype) for other in range(world.size)]
            wanted = add_in_rank_order([part(one, world.rank, world.size) for one in inputs])
            half = size // 2
            for placing, (start, stop) in itertools.product(PLACINGS, ((0, size), (0, half), (half, size))):
                pieces = [part(inputs[world.rank], index, world.size)[start:stop] for index in range(world.size)]
                given, output = place(accelerator, torch.cat(pieces), placing), blank(accelerator, stop - start, FP32)
                collectives.reduce_scatter(output.tensor, given.tensor, world).wait()
                if not torch.equal(output.read(), wanted[start:stop]):
                    wrong.append(f"reduce_scatter of elements {start} to {stop} of {size}, {placing}")
                given.release()
                output.release()
            if dtype == FP32:
                vector = place(accelerator, inputs[world.rank])
                collectives.all_reduce(vector.tensor, world).wait()
                if not torch.equal(vector.read(), add_in_rank_order(inputs)):
                    wrong.append(f"all_reduce of {size}")
    return wrong


def reduce_special_values(dtype_name: str) -> None:
    """Infinities and NaN of one rank arrive in a sum into fp32, and nowhere else."""
    dtype = to_dtype(dtype_name)
    with opened() as accelerator:
        world, size = accelerator.collectives.world, 40
        inputs = [draw(other, size * world.size, dtype) for other in range(world.size)]
        for index in range(world.size):
            special = part(inputs[-1], index, world.size)
            special[3], special[5], special[39] = math.inf, math.nan, -math.inf
        terms = [part(one, world.rank, world.size) for one in inputs]
        given, output = place(accelerator, inputs[world.rank]), blank(accelerator, size, FP32)
        accelerator.collectives.reduce_scatter(output.tensor, given.tensor, world).wait()
        scattered = output.read()
        vector = place(accelerator, terms[0] if world.rank else terms[-1].clone())
        accelerator.collectives.all_reduce(vector.tensor, world).wait()
        for name, result in (("reduce_scatter", scattered), ("all_reduce", vector.read())):
            found = [at for at, value in enumerate(result.tolist()) if not math.isfinite(value)]
            assert found == [3, 5, 39], f"{name}: not finite at {found}"
            assert (result[3].item(), result[39].item()) == (math.inf, -math.inf), name
            assert math.isnan(result[5].item()), name
        finite = [at for at in range(size) if at not in (3, 5, 39)]
        check_reduced(scattered[finite], [term[finite] for term in terms], "sum", "beside special values")


def all_reduce(dtype_name: str) -> list[bytes]:
    """all_reduce of every size, in every kind of memory; the bits of the results, which must agree over the ranks."""
    dtype = to_dtype(dtype_name)
    results = []
    with opened() as accelerator:
        world = accelerator.collectives.world
        for size in SIZES:
            terms = [draw(other, size, dtype) for other in range(world.size)]
            for op, placing in itertools.product(OPS, PLACINGS):
                vector = place(accelerator, terms[world.rank], placing)
                accelerator.collectives.all_reduce(vector.tensor, world, op=op, tag="norm").wait()
                check_reduced(vector.read(), terms, op, op, size, placing)
                results.append(accelerator.to_bytes(vector.tensor))
                vector.release()
    return results


def broadcast(dtype_name: str) -> None:
    """broadcast from every rank, of every size, in every kind of memory."""
    with opened() as accelerator:
        world = accelerator.collectives.world
        for dtype, size in itertools.product(to_dtypes(dtype_name), SIZES):
            for source in range(world.size):
                for placing in PLACINGS if size < 40000 else PLACINGS[-1:]:
                    tensor = place(accelerator, draw(world.rank, size, dtype), placing)
                    accelerator.collectives.broadcast(tensor.tensor, source, world, tag="start").wait()
                    tensor.expect(draw(source, size, dtype), dtype, size, placing, "from", source)
                    tensor.release()


def all_to_all(dtype_name: str, equal: bool) -> None:
    """all_to_all with equal splits, or with uneven and zero ones, out of and into every kind of memory."""
    with opened() as accelerator:
        world = accelerator.collectives.world
        tables = equal_split_tables(world.size) if equal else split_tables(world.size)
        for dtype, (name, splits) in itertools.product(to_dtypes(dtype_name), tables.items()):
            inputs = [draw(one, sum(splits[one]), dtype) for one in range(world.size)]
            wanted = torch.cat([inputs[one].split(splits[one])[world.rank] for one in range(world.size)])
            arriving = [row[world.rank] for row in splits]
            most = max(max(map(sum, splits)), max(map(sum, zip(*splits, strict=True))))
            for placing in PLACINGS:
                given = place(accelerator, inputs[world.rank], placing, room=most)
                output = place(accelerator, torch.zeros(sum(arriving), dtype=dtype, device="cpu"), placing, room=most)
                accelerator.collectives.all_to_all(
                    output.tensor, given.tensor, arriving, splits[world.rank], world, tag="tokens"
                ).wait()
                output.expect(wanted, dtype, name, placing)
                given.expect(inputs[world.rank], "the input of", dtype, name, placing)
                given.release()
                output.release()


def equal_split_tables(size: int) -> dict[str, list[list[int]]]:
    """Row i holds what rank i sends to each: here the same on every rank."""
    counts = {"nothing": 0, "one element each": 1, "many elements each": 9001}
    return {name: [[count] * size for _ in range(size)] for name, count in counts.items()}


def split_tables(size: int) -> dict[str, list[list[int]]]:
    """Tables of other splits on each rank. In a ring all totals agree, and only the directions tell ranks apart."""
    ranks = range(size)
    return {
        "uneven": [[(3 * one + 5 * other) % 4 * 257 for other in ranks] for one in ranks],
        "a ring": [[(other - one) % size * 33 for other in ranks] for one in ranks],
        "to the first rank only": [[9001 if other == 0 else 0 for other in ranks] for _ in ranks],
    }
