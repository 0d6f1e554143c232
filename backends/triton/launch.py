"""How kernels are launched: with what, on which device, and what is compiled ahead of time.

A `Variant` is one program: a function of Triton with the types of its arguments and its constants. A wrapper launches
variants only, so that what was compiled without a device is what runs on one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import torch
import triton
from torch import Tensor

IMPLEMENTATION: Final = "triton"
ALIGNMENT: Final = 16
"""Bytes that one thread moves at once, where all addresses are multiples of it."""
TYPE_NAMES: Final = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""What Triton calls the dtypes of vectors; `*` before it makes a pointer."""


@dataclass(frozen=True)
class Variant:
    """One program of a kernel."""

    name: str
    function: Any
    """What `triton.jit` made."""
    signature: dict[str, str]
    """Each argument's type in Triton's words: `*bf16`, `i32`, `*u1` for bool; `constexpr` if `constants` gives it."""
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    fp_fusion: bool = False
    """Whether a product may go unrounded into a sum. Kernels that promise bits forbid it."""
    aligned: tuple[str, ...] = ()
    """Arguments that are multiples of 16, addresses of 16 bytes, when this is compiled ahead of time."""
    max_registers: int | None = None
    """Of one thread, where fewer than the compiler would take let a multiprocessor hold one block more."""

    @property
    def options(self) -> dict[str, Any]:
        """What Triton compiles with, at a launch as ahead of time."""
        limits = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fp_fusion,
            **limits,
        }


def make_vector_variant(
    title: str,
    function: Any,
    vectors: Mapping[str, torch.dtype | None],  # None: there is no such vector
    others: Mapping[str, str | None],  # arguments besides, by Triton's names of their types; None: not given
    constants: Mapping[str, Any],
    *,
    num_warps: int,
    aligned: bool = True,
) -> Variant:
    """The program of a kernel that goes over `count` elements of some vectors, `BLOCK` of them at a time.

    At a launch Triton itself sees whether addresses are aligned; ahead of time `aligned` says it.
    """
    given = {name: None if dtype is None else f"*{TYPE_NAMES[dtype]}" for name, dtype in vectors.items()}
    types = {**given, **others, "count": "i32"}
    absent = {name: None for name, kind in types.items() if kind is None}
    return Variant(
        name=f"{title}{'' if aligned else ', any alignment'}",
        function=function,
        signature={name: kind or "constexpr" for name, kind in types.items()} | dict.fromkeys(constants, "constexpr"),
        constants={**constants, **absent},
        num_warps=num_warps,
        aligned=tuple(name for name in vectors if name not in absent) if aligned else (),
    )


def launch_over(variant: Variant, count: int, device: torch.device, **arguments: Tensor | None) -> None:
    """Launch a program over `count` elements, a block for each `BLOCK` of them; of nothing there is no launch."""
    if count > 0:
        given = {name: tensor for name, tensor in arguments.items() if tensor is not None}
        launch(variant, (triton.cdiv(count, variant.constants["BLOCK"]),), device, count=count, **given)


@cache
def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the host; settled when Triton is imported."""
    return bool(triton.knobs.runtime.interpret)


def launch(variant: Variant, grid: tuple[int, ...], device: torch.device, **arguments: Any) -> None:
    """Start a program on the current stream of `device`, where its tensors are; the host does not wait for it."""
    with _current(device):
        variant.function[grid](**arguments, **variant.constants, **variant.options)


def all_aligned(addresses: Iterable[int]) -> bool:
    """Whether addresses are multiples of 16 bytes."""
    return all(address % ALIGNMENT == 0 for address in addresses)


def require(kernel: str, argument: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], count: int) -> None:
    """Raise ValueError unless a vector is contiguous, of one of `dtypes`, and holds `count` elements."""
    if tensor.numel() == count and tensor.dtype in dtypes and tensor.is_contiguous():
        return
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    layout = "contiguous" if tensor.is_contiguous() else "strided"
    raise ValueError(
        f"kernel {kernel!r} got {argument} as {layout} {str(tensor.dtype).removeprefix('torch.')}"
        f"{list(tensor.shape)}, wanted contiguous {names}[{count}]; pass vectors of one length, and cast them with "
        f"'scale_cast' where the dtype differs"
    )


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which is nearly always the right one."""
    if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
        return nullcontext()
    return torch.accelerator.device_index(device.index)
