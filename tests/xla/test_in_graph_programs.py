"""What each collective adds to the XLA program, read from its text: for worlds that do not exist, on one device."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as metrics
from torch import Tensor

from in_graph_worlds import AgreeingHost, Ranks, make_transport
from windlass.accelerator.errors import CollectiveMismatch, Unsupported
from windlass.backends.cpu.transport import Call
from windlass.backends.xla.in_graph import InGraphTransport

PAIR = [(0, 1)]
FOUR = [(0, 1, 2, 3)]
HALVES = [(0, 1), (2, 3)]
STRIDES = [(0, 2), (1, 3)]
BACKWARDS = [(3, 2, 1, 0)]
WORLDS = pytest.mark.parametrize("groups", [PAIR, FOUR, HALVES, STRIDES, BACKWARDS], ids=str)

Use = Callable[[InGraphTransport], Tensor]  # makes a call and returns its output


@dataclass(frozen=True)
class Instruction:
    """One collective of a program's text."""

    name: str  # "all-gather"
    result: str  # "f32[8,128]"
    operand: str
    replica_groups: str
    dimensions: str
    computation: str  # "Add", "Max" or ""


@pytest.fixture(autouse=True)
def _lowered_for_one_replica(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XLA_ALWAYS_ALLREDUCE", "1")  # torch_xla leaves the instruction out where it sees one replica
    yield
    torch_xla.sync()  # what a test left pending must not end up in the next one's program


@WORLDS
def test_an_all_gather_has_rows_of_a_register(groups: list[Ranks]) -> None:
    wanted = Instruction("all-gather", f"f32[{2 * len(groups[0])},128]", "f32[2,128]", _braces(groups), "0", "")
    assert _instructions(_program(groups, lambda transport: _gather(transport, 256))) == [wanted]


@WORLDS
@pytest.mark.parametrize(("given", "wanted"), [("float32", "f32"), ("bfloat16", "bf16"), ("int64", "s64")])
def test_an_all_gather_moves_its_dtype(groups: list[Ranks], given: str, wanted: str) -> None:
    (found,) = _instructions(_program(groups, lambda transport: _gather(transport, 6, getattr(torch, given))))
    assert (found.operand, found.result) == (f"{wanted}[6]", f"{wanted}[{6 * len(groups[0])}]")


@WORLDS
@pytest.mark.parametrize(
    ("given", "asked"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_a_reduce_scatter_adds_in_fp32(groups: list[Ranks], given: torch.dtype, asked: torch.dtype) -> None:
    size = len(groups[0])

    def use(transport: InGraphTransport) -> Tensor:
        output, input = _zeros(3, asked), _zeros(3 * size, given)
        transport.reduce_scatter(output, input, "sum", Call("reduce_scatter", "g", input.nbytes, given, asked, "sum"))
        return output

    text = _program(groups, use)
    assert _instructions(text) == [
        Instruction("reduce-scatter", "f32[3]", f"f32[{3 * size}]", _braces(groups), "0", "Add")
    ]
    assert text.split("ROOT")[-1].split()[2].startswith(f"({_name(asked)}[3]")


@WORLDS
def test_a_reduce_scatter_takes_the_largest(groups: list[Ranks]) -> None:
    size = len(groups[0])

    def use(transport: InGraphTransport) -> Tensor:
        output, input = _zeros(256), _zeros(256 * size)
        transport.reduce_scatter(output, input, "max", Call("reduce_scatter", "g", input.nbytes, input.dtype, op="max"))
        return output

    wanted = Instruction("reduce-scatter", "f32[2,128]", f"f32[{2 * size},128]", _braces(groups), "0", "Max")
    assert _instructions(_program(groups, use)) == [wanted]


@WORLDS
@pytest.mark.parametrize(("op", "computation"), [("sum", "Add"), ("max", "Max")])
def test_an_all_reduce_keeps_the_vector_whole(groups: list[Ranks], op: str, computation: str) -> None:
    def use(transport: InGraphTransport) -> Tensor:
        tensor = _zeros(3)
        transport.all_reduce(tensor, "max" if op == "max" else "sum", Call("all_reduce", "n", 12, tensor.dtype, op=op))
        return tensor

    (found,) = _instructions(_program(groups, use))
    assert found.name == "all-reduce"
    assert found.operand == "f32[3]"
    assert (found.replica_groups, found.computation) == (_braces(groups), computation)


@WORLDS
def test_equal_parts_are_exchanged_as_they_are(groups: list[Ranks]) -> None:
    size = len(groups[0])
    text = _program(groups, _exchange([5] * size, [5] * size), rows=[[5] * (2 * size)] * size)
    shape = f"f32[{5 * size}]"
    assert _instructions(text) == [Instruction("all-to-all", shape, shape, _braces(groups), "0", "")]
    assert "gather(" not in text


def test_uneven_parts_are_filled_up_to_the_largest() -> None:
    rows = [[1, 3, 1, 3], [3, 1, 3, 1]]  # sent to 0 and 1, received from 0 and 1
    texts = [_program(PAIR, _exchange(row[:2], row[2:]), rows=rows, rank=rank) for rank, row in enumerate(rows)]
    assert _instructions(texts[0]) == [Instruction("all-to-all", "f32[6]", "f32[6]", "{{0,1}}", "0", "")]
    assert texts[0] == texts[1]


def test_splits_that_do_not_fit_are_named() -> None:
    rows = [[2, 2, 2, 2], [3, 1, 2, 1]]
    with pytest.raises(CollectiveMismatch, match=r"rank 1 sends 3 elements to rank 0 in all_to_all 'm', which expects"):
        _program(PAIR, _exchange([2, 2], [2, 2]), rows=rows)


def test_lengths_that_differ_have_no_program() -> None:
    rows = [[2, 2, 2, 3], [3, 1, 2, 1]]
    with pytest.raises(Unsupported, match=r"outputs of \[5, 3\] elements.* pad them to one length on every rank"):
        _program(PAIR, _exchange([2, 2], [2, 3]), rows=rows)


@WORLDS
def test_a_broadcast_is_an_exchange_and_a_gather(groups: list[Ranks]) -> None:
    size = len(groups[0])

    def use(transport: InGraphTransport) -> Tensor:
        tensor = _zeros(256 * size)
        transport.broadcast(tensor, size - 1, Call("broadcast", "w", tensor.nbytes, tensor.dtype, source=size - 1))
        return tensor

    text = _program(groups, use)
    whole, part = f"f32[{2 * size},128]", "f32[2,128]"
    assert _instructions(text) == [
        Instruction("all-to-all", whole, whole, _braces(groups), "0", ""),
        Instruction("all-gather", whole, part, _braces(groups), "0", ""),
    ]
    assert f"slice={{[{256 * (size - 1)}:{256 * size}]}}" in text


@WORLDS
def test_every_rank_has_the_same_program(groups: list[Ranks]) -> None:
    size = len(groups[0])
    equal = [[2] * (2 * size)] * size

    def use(transport: InGraphTransport) -> Tensor:
        gathered, shard = _zeros(4 * size), _zeros(4)
        transport.all_gather(gathered, shard, Call("all_gather", "w", 16, shard.dtype))
        transport.reduce_scatter(shard, gathered, "sum", Call("reduce_scatter", "g", 16 * size, shard.dtype, op="sum"))
        transport.all_reduce(shard, "max", Call("all_reduce", "n", 16, shard.dtype, op="max"))
        transport.broadcast(shard, 1, Call("broadcast", "b", 16, shard.dtype, source=1))
        return shard + _exchange([2] * size, [2] * size)(transport)[:1]

    texts = {_program(groups, use, rows=equal, rank=rank) for rank in range(sum(len(ranks) for ranks in groups))}
    assert len(texts) == 1


@WORLDS
def test_no_number_is_added_to_keep_the_order(groups: list[Ranks]) -> None:
    def use(transport: InGraphTransport) -> Tensor:
        whole = _gather(transport, 8)
        part = _zeros(8)
        transport.reduce_scatter(part, whole, "sum", Call("reduce_scatter", "g", whole.nbytes, whole.dtype, op="sum"))
        return _gather(transport, 8, source=part)

    entry = _program(groups, use).split("ENTRY")[1]
    assert len(_instructions(entry)) == 3
    assert " add(" not in entry
    assert " multiply(" not in entry


def test_a_call_executes_nothing_and_stays_on_the_device() -> None:
    torch_xla.sync(wait=True)
    metrics.clear_all()
    rows = [[1, 3, 1, 3], [3, 1, 3, 1]]
    transport = make_transport(PAIR, 0, rows)
    _gather(transport, 6)
    _exchange([1, 3], [1, 3])(transport)
    assert metrics.counter_value("ExecuteComputation") is None
    assert metrics.metric_data("ExecuteTime") is None
    assert [name for name in metrics.counter_names() if name.startswith("aten::")] == []  # what falls back to the host


def test_ranks_agree_on_the_first_use_of_a_call_only() -> None:
    transport = make_transport(HALVES, 2)
    for _ in range(3):
        _gather(transport, 6)
        _gather(transport, 8)
    assert isinstance(transport._host, AgreeingHost)
    assert transport._host.agreed == ["all_gather 'w'", "all_gather 'w'"]
    transport.barrier(Call("barrier", "", 0, torch.uint8))
    assert transport._host.agreed[2:] == ["barrier"]
    assert transport.exchange("text") == ["text", "text"]


# ---- programs and their texts


def _program(groups: Sequence[Ranks], use: Use, *, rows: Sequence[Sequence[int]] = (), rank: int = 0) -> str:
    output = use(make_transport(groups, rank, rows))
    text: str = torch_xla._XLAC._get_xla_tensors_hlo([output])
    return text


def _instructions(text: str) -> list[Instruction]:
    found = []
    for line in text.splitlines():
        match = re.search(r"= \(?([a-z0-9]+\[[\d,]*\]).*? (all-\w+(?:-\w+)?|reduce-scatter)\((.*?)\), (.*)", line)
        if match is None:
            continue
        result, name, operands, attributes = match.groups()
        operand = re.match(r"[a-z0-9]+\[[\d,]*\]", operands)
        groups = re.search(r"replica_groups=(\{\{.*?\}\})", attributes)
        dimensions = re.search(r"dimensions=\{(\d*)\}", attributes)
        computation = re.search(r"to_apply=%(\w+)Computation", attributes)
        assert operand is not None
        assert groups is not None
        found.append(
            Instruction(
                name,
                result,
                operand[0],
                groups[1],
                dimensions[1] if dimensions else "",
                computation[1] if computation else "",
            )
        )
    return found


def _braces(groups: Sequence[Ranks]) -> str:
    return "{" + ",".join("{" + ",".join(map(str, ranks)) + "}" for ranks in groups) + "}"


def _zeros(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Data of the device, as what was computed in an earlier step is; zeros made there are constants of the program."""
    return torch.zeros(numel, dtype=dtype).to("xla")


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]


def _gather(
    transport: InGraphTransport, numel: int, dtype: torch.dtype = torch.float32, source: Tensor | None = None
) -> Tensor:
    part = _zeros(numel, dtype) if source is None else source
    output = _zeros(numel * transport.group.size, dtype)
    transport.all_gather(output, part, Call("all_gather", "w", part.nbytes, dtype)).wait()
    return output


def _exchange(input_splits: Sequence[int], output_splits: Sequence[int]) -> Use:
    def use(transport: InGraphTransport) -> Tensor:
        input, output = _zeros(sum(input_splits)), _zeros(sum(output_splits))
        call = Call("all_to_all", "m", -1, input.dtype)
        transport.all_to_all(output, input, output_splits, input_splits, call).wait()
        return output

    return use
