"""AdamW of many vectors in one launch, through a table of their addresses on the device.

Launches cost microseconds each, a small vector less: so all parts of one kind, that is of one dtype of gradient and one
of low copy, go together. The table of a kind lists addresses and lengths, and for each program its part. It is made
when tensors are first seen and kept, so that from then on a step copies nothing and a graph can record the launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from windlass.accelerator.kernels import Kernel
from windlass.accelerator.reference.adamw import ADAMW_SCALARS, Part, Updated
from windlass.backends.triton.adamw import BLOCK, WARPS, require_vectors, update_block
from windlass.backends.triton.launch import IMPLEMENTATION, TYPE_NAMES, Variant, all_aligned, launch, require

Entry = tuple[int, int, int, int, int, int, int]
"""Addresses of weight, gradient, exp_avg, exp_avg_sq and low, the number of elements, the row of scalars."""
Kind = tuple[torch.dtype, torch.dtype | None]

TABLES: Final = 64
_FIELDS: Final = 8
_ENTRY: Final = tl.constexpr(_FIELDS)
_ROW: Final = tl.constexpr(len(ADAMW_SCALARS))
_TRITON: Final = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def update_parts(
    entries: tl.tensor,
    block_parts: tl.tensor,
    scalars: tl.tensor,
    gradient_scale: tl.tensor,
    keep: tl.tensor,
    GRADIENT: tl.constexpr,
    LOW: tl.constexpr,
    DECOUPLED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One block of the part that `block_parts` names. LOW is None where there are no low copies."""
    block = tl.program_id(0)
    entry = entries + tl.load(block_parts + block) * _ENTRY
    start = (block - tl.load(entry + 6)) * BLOCK
    rest = tl.load(entry + 5) - start
    numbers = scalars + tl.load(entry + 7) * _ROW
    weight = _point(entry, tl.float32, start, ALIGNED)
    gradient = _point(entry + 1, GRADIENT, start, ALIGNED)
    exp_avg = _point(entry + 2, tl.float32, start, ALIGNED)
    exp_avg_sq = _point(entry + 3, tl.float32, start, ALIGNED)
    low = None if LOW is None else _point(entry + 4, LOW, start, ALIGNED)
    if rest >= BLOCK:
        update_block(
            weight, gradient, exp_avg, exp_avg_sq, low, numbers, gradient_scale, keep, None, start, rest,
            DECOUPLED, False, BLOCK,
        )  # fmt: skip
    else:
        update_block(
            weight, gradient, exp_avg, exp_avg_sq, low, numbers, gradient_scale, keep, None, start, rest,
            DECOUPLED, True, BLOCK,
        )  # fmt: skip


@triton.jit
def _point(field: tl.tensor, dtype: tl.constexpr, start: tl.tensor, ALIGNED: tl.constexpr) -> tl.tensor:
    """The address in a field of the table, moved by `start` elements."""
    pointer = tl.load(field).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@cache
def make_variant(gradient: torch.dtype, low: torch.dtype | None, decoupled: bool, aligned: bool) -> Variant:
    """The program for one kind of parts; `aligned` promises that all their addresses are multiples of 16."""
    return Variant(
        name=(
            f"adamw_many of {TYPE_NAMES[gradient]} gradients, {'no' if low is None else TYPE_NAMES[low]} low copies"
            f"{'' if decoupled else ', L2'}{'' if aligned else ', any alignment'}"
        ),
        function=update_parts,
        signature={
            "entries": "*i64",
            "block_parts": "*i32",
            "scalars": "*fp32",
            "gradient_scale": "*fp32",
            "keep": "*u1",
            **dict.fromkeys(("GRADIENT", "LOW", "DECOUPLED", "ALIGNED", "BLOCK"), "constexpr"),
        },
        constants={
            "GRADIENT": _TRITON[gradient],
            "LOW": None if low is None else _TRITON[low],
            "DECOUPLED": decoupled,
            "ALIGNED": aligned,
            "BLOCK": BLOCK,
        },
        num_warps=WARPS,
    )


VARIANTS: tuple[Variant, ...] = (
    *(make_variant(gradient, low, True, True) for gradient in _TRITON for low in (None, torch.bfloat16, torch.float16)),
    make_variant(torch.bfloat16, torch.bfloat16, False, True),
    make_variant(torch.bfloat16, torch.bfloat16, True, False),
)


@dataclass
class PartTable:
    """Where the parts of one kind are, on the device."""

    entries: Tensor
    """int64 [parts, 8]: addresses of weight, gradient, exp_avg, exp_avg_sq, low; elements, first block, row."""
    block_parts: Tensor
    """int32 [blocks]: the part of each program."""
    aligned: bool
    """Whether all addresses are multiples of 16."""
    stream: torch.Stream | None
    """On which the table was copied; None on the host."""
    copied: torch.Event | None
    """Reached when it has been copied; None once that is known."""


def adamw_many(
    parts: Sequence[Part],
    scalars: Tensor,
    rows: Sequence[int],
    gradient_scale: Tensor,
    keep: Tensor,
    *,
    decoupled: bool = True,
) -> list[Updated]:
    """One AdamW update of many vectors in place; see `reference.adamw_many`.

    Raises RuntimeError while a graph is recorded, unless these tensors were updated before.
    """
    if len(rows) != len(parts):
        raise ValueError(
            f"kernel 'adamw_many' got {len(rows)} rows for {len(parts)} parts, wanted one for each; "
            f"say which row of scalars each part takes"
        )
    count = len(scalars)
    require("adamw_many", "scalars", scalars, (torch.float32,), count * len(ADAMW_SCALARS))
    require("adamw_many", "gradient_scale", gradient_scale, (torch.float32,), 1)
    require("adamw_many", "keep", keep, (torch.bool,), 1)
    for kind, entries in _sort_parts(parts, rows, count, scalars.device).items():
        table = find_table(scalars.device, entries)
        launch(
            make_variant(*kind, decoupled, table.aligned),
            (len(table.block_parts),),
            scalars.device,
            entries=table.entries,
            block_parts=table.block_parts,
            scalars=scalars,
            gradient_scale=gradient_scale,
            keep=keep,
        )
    return [(weight, exp_avg, exp_avg_sq, low) for weight, _, exp_avg, exp_avg_sq, low in parts]


def _sort_parts(
    parts: Sequence[Part], rows: Sequence[int], count: int, device: torch.device
) -> dict[Kind, tuple[Entry, ...]]:
    """The parts that have elements by kind, once they are known to fit together."""
    kinds: dict[Kind, list[Entry]] = {}
    for part, row in zip(parts, rows, strict=True):
        require_vectors("adamw_many", torch.float32, part)
        if not 0 <= row < count:
            raise ValueError(
                f"kernel 'adamw_many' got row {row} for a part, wanted 0 to {count - 1}; scalars have {count} rows"
            )
        weight, gradient, exp_avg, exp_avg_sq, low = part
        if weight.numel() == 0:
            continue
        for vector in part:  # Triton, which would refuse memory of the host, sees addresses only
            if vector is not None and vector.device != device:
                raise ValueError(
                    f"kernel 'adamw_many' got a vector on {vector.device}, wanted {device}, where scalars are; "
                    f"copy it there"
                )
        entry = (
            weight.data_ptr(), gradient.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(),
            0 if low is None else low.data_ptr(), weight.numel(), row,
        )  # fmt: skip
        kinds.setdefault((gradient.dtype, None if low is None else low.dtype), []).append(entry)
    return {kind: tuple(entries) for kind, entries in kinds.items()}


_recorded: dict[int, PartTable] = {}
"""Tables that graphs read whenever they run, so that they live as long as the process."""


def find_table(device: torch.device, entries: tuple[Entry, ...]) -> PartTable:
    """The table of these parts, ready for what the current stream runs next."""
    table = make_table(device, entries)
    if table.stream is None:
        return table
    if _is_recording(device):
        _recorded[id(table)] = (
            table  # its copy is over: it came before an update of the same tensors, and so before this
        )
        return table
    current = torch.accelerator.current_stream(device)
    if current != table.stream:
        table.entries.record_stream(current)
        table.block_parts.record_stream(current)
    if table.copied is not None:
        if table.copied.query():
            table.copied = None
        else:
            current.wait_event(table.copied)
    return table


@lru_cache(TABLES)
def make_table(device: torch.device, entries: tuple[Entry, ...]) -> PartTable:
    """A new table, on its way to the device. It stays valid as long as the tensors are where they are."""
    if _is_recording(device):
        raise RuntimeError(
            "kernel 'adamw_many' got tensors for the first time while a graph is recorded, which cannot copy their "
            "addresses; update the same tensors once before"
        )
    fields = np.array(entries, np.int64)
    addresses, counts, rows = fields[:, :5], fields[:, 5:6], fields[:, 6:]
    blocks = -(-counts // BLOCK)
    first_blocks = np.cumsum(blocks, axis=0) - blocks
    table = np.concatenate([addresses, counts, first_blocks, rows], axis=1)
    block_parts = np.repeat(np.arange(len(entries), dtype=np.int32), blocks[:, 0])
    on_host = torch.from_numpy(table), torch.from_numpy(block_parts)
    aligned = all_aligned(addresses.flatten().tolist())
    if device.type == "cpu":
        return PartTable(*on_host, aligned, None, None)
    in_table, in_block_parts = (each.pin_memory().to(device, non_blocking=True) for each in on_host)
    stream = torch.accelerator.current_stream(device)
    return PartTable(in_table, in_block_parts, aligned, stream, stream.record_event())


def _is_recording(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


KERNELS: tuple[Kernel, ...] = (Kernel("adamw_many", IMPLEMENTATION, adamw_many),)
