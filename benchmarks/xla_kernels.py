"""How the kernels in JAX compare with the references and with what XLA's CPU can do at all, on this machine.

    PJRT_DEVICE=CPU python benchmarks/xla_kernels.py [--elements 2000000] [--rounds 9] [--json]

Every round runs each candidate once as a program of its own, the floors beside them; the best round counts, so that a
busy machine slows all alike. The floor of the kernels on vectors is a scaled copy, 8 bytes an element, and bytes are
those that a kernel must read and write. The floor of polar is one product of each matrix by itself transposed, and
its operations are those of all its products. The reference goes through the same compiler: what is between them is
what the form of the program is worth.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from windlass.accelerator.kernels import REFERENCE
from windlass.accelerator.polar import COEFFICIENTS
from windlass.backends.xla.device import XlaAccelerator, open_torch_xla

_IMPLEMENTATIONS = (REFERENCE, "jax")
_COPY, _PRODUCT = "copy", "product"
_SHAPE = (4, 256, 768)


@dataclass(frozen=True)
class Candidate:
    """Something to run as one program. Its work is in bytes, or in operations where the floor is a product."""

    kernel: str
    implementation: str
    variant: str
    floor: str
    work: float
    run: Callable[[], object]


@dataclass(frozen=True)
class Figure:
    """What one candidate took in its best round."""

    kernel: str
    implementation: str
    variant: str
    milliseconds: float
    rate: float  # 1e9 bytes or operations a second
    fraction_of_floor: float
    times_reference: float | None  # its own time as a multiple of the reference's


def list_candidates(accelerator: XlaAccelerator, elements: int) -> list[Candidate]:
    """The floors, then each kernel by each implementation."""
    random = torch.Generator().manual_seed(0)

    def bring(host: Tensor) -> Tensor:
        return host.to(accelerator.device)

    weight, gradient, exp_avg, exp_avg_sq = (bring(torch.rand(elements, generator=random)) for _ in range(4))
    narrow, low = gradient.bfloat16(), gradient.bfloat16()
    narrow_target, wide_target = bring(torch.rand(elements).bfloat16()), bring(torch.rand(elements))
    scalars = bring(torch.tensor([1e-3, 0.9, 0.1, 0.999, 0.001, 1e-8, 0.01, 0.1, 0.001]))
    half, keep = bring(torch.tensor(0.5)), bring(torch.tensor(True))
    stack = bring(torch.randn(_SHAPE, generator=random))
    batch, rows, columns = _SHAPE
    product = 2.0 * batch * rows * rows * columns
    polar = len(COEFFICIENTS["jordan"]) * (2 * product + 2.0 * batch * rows**3)
    candidates = [
        Candidate(_COPY, "torch_xla", "fp32", _COPY, 8.0 * elements, lambda: gradient * half),
        Candidate(_PRODUCT, "torch_xla", f"{_SHAPE}", _PRODUCT, product, lambda: stack @ stack.mT),
    ]

    for name in _IMPLEMENTATIONS:
        for kernel in ("adamw", "square_sum", "scale_cast", "polar"):
            accelerator.kernels.choose(kernel, name)
        update, add_up, cast, factor = (
            accelerator.kernels[kernel] for kernel in ("adamw", "square_sum", "scale_cast", "polar")
        )

        def step(update: Callable[..., tuple[Tensor, ...]] = update) -> None:
            state = (weight, exp_avg, exp_avg_sq, low)
            _keep(state, update(weight, narrow, exp_avg, exp_avg_sq, scalars, half, keep, low))

        def write(target: Tensor, source: Tensor, cast: Callable[..., Tensor] = cast) -> None:
            _keep((target,), (cast(target, source, half),))

        def add(kernel: str, variant: str, floor: str, work: float, run: Callable[[], object], by: str = name) -> None:
            candidates.append(Candidate(kernel, by, variant, floor, work, run))

        add("adamw", "bf16, low bf16", _COPY, 28.0 * elements, step)
        add("square_sum", "fp32", _COPY, 4.0 * elements, partial(add_up, gradient, half))
        add("square_sum", "bf16", _COPY, 2.0 * elements, partial(add_up, narrow, half))
        add("scale_cast", "fp32 to bf16", _COPY, 6.0 * elements, partial(write, narrow_target, gradient))
        add("scale_cast", "bf16 to fp32", _COPY, 6.0 * elements, partial(write, wide_target, narrow))
        for dtype in (torch.float32, torch.bfloat16):
            variant = f"{_SHAPE}, jordan, products in {str(dtype).removeprefix('torch.')}"
            run = partial(factor, stack, COEFFICIENTS["jordan"], product_dtype=dtype)
            add("polar", variant, _PRODUCT, polar, run)
    return candidates


def _keep(state: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> None:
    """As the core does: results are written where the state lives, and the compiler makes that in place."""
    for tensor, result in zip(state, results, strict=True):
        if result is not tensor:
            tensor.copy_(result)


def measure(accelerator: XlaAccelerator, candidates: list[Candidate], rounds: int) -> list[Figure]:
    """Best time of each candidate, compared with its floor and its reference."""
    best = [float("inf")] * len(candidates)
    for number in range(rounds + 2):  # two rounds more, which compile
        for index, candidate in enumerate(candidates):
            start = accelerator.clock()
            kept = candidate.run()
            accelerator.streams.boundary()
            accelerator.streams.synchronize()
            seconds = time.perf_counter() - start
            del kept
            if number >= 2:
                best[index] = min(best[index], seconds)
    rates = [each.work / seconds for each, seconds in zip(candidates, best, strict=True)]
    floors = {each.kernel: rate for each, rate in zip(candidates, rates, strict=True) if each.kernel == each.floor}
    references = {
        (each.kernel, each.variant): seconds
        for each, seconds in zip(candidates, best, strict=True)
        if each.implementation == REFERENCE
    }
    return [
        Figure(
            each.kernel, each.implementation, each.variant, seconds * 1e3, rate / 1e9, rate / floors[each.floor],
            seconds / references[each.kernel, each.variant] if (each.kernel, each.variant) in references else None,
        )
        for each, seconds, rate in zip(candidates, best, rates, strict=True)
    ]  # fmt: skip


def make_table(figures: list[Figure], elements: int) -> Table:
    """The figures for people."""
    table = Table(title=f"Kernels on XLA's CPU, vectors of {elements:,} elements")
    for name in ("kernel", "implementation", "variant"):
        table.add_column(name)
    for name in ("ms", "GB/s or GFLOP/s", "of floor", "time / reference"):
        table.add_column(name, justify="right")
    for each in figures:
        ratio = "" if each.times_reference is None else f"{each.times_reference:.2f}"
        table.add_row(
            each.kernel, each.implementation, each.variant, f"{each.milliseconds:.2f}", f"{each.rate:.1f}",
            f"{each.fraction_of_floor:.0%}", ratio,
        )  # fmt: skip
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure the kernels in JAX against the references and XLA's limits.")
    parser.add_argument("--elements", type=int, default=2_000_000, help="length of every vector (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="times each candidate runs (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    if options.elements < 1 or options.rounds < 1:
        parser.error("--elements and --rounds must be at least 1")
    accelerator = open_torch_xla()
    try:
        figures = measure(accelerator, list_candidates(accelerator, options.elements), options.rounds)
    finally:
        accelerator.close()
    if options.json:
        print(json.dumps({"elements": options.elements, "figures": [asdict(each) for each in figures]}))
    else:
        Console().print(make_table(figures, options.elements))


if __name__ == "__main__":
    main()
