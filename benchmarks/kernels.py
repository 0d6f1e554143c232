"""How near the processor's kernels come to the speed of memory, on one thread.

    python benchmarks/kernels.py [--elements 15000000] [--rounds 15] [--json]

Every round times each kernel once, and a triad, a = b + s * c, beside them; the best round counts, so that
a busy machine slows all of them alike. Bytes are those a kernel must read and write, the triad's too
(12 per element). Reading a line before writing it whole is not counted, so that a kernel which
writes what it has read can pass the triad.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from windlass.accelerator.reference import reference_kernels
from windlass.backends.cpu.kernels import cpu_kernels

_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_TRIAD = "triad"


@dataclass(frozen=True)
class Candidate:
    """Something to time, and the bytes it must move per element."""

    kernel: str
    implementation: str
    variant: str
    bytes_per_element: int
    run: Callable[[], object]


@dataclass(frozen=True)
class Figure:
    """What one candidate took in its best round."""

    kernel: str
    implementation: str
    variant: str
    nanoseconds_per_element: float
    gigabytes_per_second: float  # 1e9 bytes
    fraction_of_triad: float


def list_candidates(elements: int, *, with_reference: bool) -> list[Candidate]:
    """All kernels in the dtypes a training uses, torch's fused AdamW, and the triad first."""
    random = torch.Generator().manual_seed(0)
    weight, gradient, exp_avg, exp_avg_sq = (torch.rand(elements, generator=random) for _ in range(4))
    scalars = torch.tensor([1e-3, 0.9, 0.1, 0.999, 0.001, 1e-8, 0.01, 0.1, 0.001])
    one, keep = torch.tensor(1.0), torch.tensor(True)
    sources = {dtype: gradient.to(dtype) for dtype in _SHORT}
    outputs = {dtype: torch.empty(elements, dtype=dtype) for dtype in _SHORT}
    output = outputs[torch.float32]
    candidates = [Candidate(_TRIAD, "torch", "fp32", 12, lambda: torch.add(weight, gradient, alpha=0.5, out=output))]

    for kernel in (*cpu_kernels(), *(reference_kernels() if with_reference else ())):

        def add(
            variant: str, size: int, *arguments: Tensor | None, kernel: str = kernel.name,
            implementation: str = kernel.implementation, function: Callable[..., object] = kernel.function,
        ) -> None:  # fmt: skip
            candidates.append(Candidate(kernel, implementation, variant, size, lambda: function(*arguments)))

        if kernel.name == "adamw":
            for g, low in (
                (torch.float32, None),
                (torch.float32, torch.bfloat16),
                (torch.bfloat16, torch.bfloat16),
                (torch.float16, torch.float16),
            ):
                variant = f"{_SHORT[g]}, low {_SHORT[low] if low else None}"
                add(
                    variant, 24 + g.itemsize + (low.itemsize if low else 0), weight, sources[g], exp_avg,
                    exp_avg_sq, scalars, one, keep, outputs[low] if low else None,
                )  # fmt: skip
        elif kernel.name == "square_sum":
            for dtype in _SHORT:
                add(_SHORT[dtype], dtype.itemsize, sources[dtype], one)
        elif kernel.name == "scale_cast":
            for source in _SHORT:
                for destination in _SHORT:
                    variant = f"{_SHORT[source]} to {_SHORT[destination]}"
                    add(variant, source.itemsize + destination.itemsize, outputs[destination], sources[source], one)

    parameter = torch.nn.Parameter(weight)
    parameter.grad = gradient
    optimizer = torch.optim.AdamW([parameter], fused=True)
    candidates.append(Candidate("adamw", "torch fused", "fp32, low None", 28, optimizer.step))
    return candidates


def measure(candidates: list[Candidate], elements: int, rounds: int) -> list[Figure]:
    """Best time of each candidate; the first is the triad that the others are compared with."""
    best = [float("inf")] * len(candidates)
    for _ in range(rounds + 1):  # one round more, since the first touches new pages
        for index, candidate in enumerate(candidates):
            start = time.perf_counter()
            candidate.run()
            best[index] = min(best[index], time.perf_counter() - start)
    rates = [each.bytes_per_element * elements / seconds / 1e9 for each, seconds in zip(candidates, best, strict=True)]
    return [
        Figure(each.kernel, each.implementation, each.variant, seconds / elements * 1e9, rate, rate / rates[0])
        for each, seconds, rate in zip(candidates, best, rates, strict=True)
    ]


def make_table(figures: list[Figure], elements: int) -> Table:
    """The figures for people."""
    table = Table(title=f"Kernels on one thread, {elements:,} elements")
    for name in ("kernel", "implementation", "variant"):
        table.add_column(name)
    for name in ("ns/element", "GB/s", "of triad"):
        table.add_column(name, justify="right")
    for each in figures:
        table.add_row(
            each.kernel,
            each.implementation,
            each.variant,
            f"{each.nanoseconds_per_element:.3f}",
            f"{each.gigabytes_per_second:.1f}",
            f"{each.fraction_of_triad:.0%}",
        )
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure the processor's kernels against the speed of its memory.")
    parser.add_argument(
        "--elements", type=int, default=15_000_000, help="length of every vector (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="times each kernel runs (default: %(default)s)")
    parser.add_argument("--reference", action="store_true", help="measure the reference kernels too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    if options.elements < 1 or options.rounds < 1:
        parser.error("--elements and --rounds must be at least 1")
    torch.set_num_threads(1)
    candidates = list_candidates(options.elements, with_reference=options.reference)
    figures = measure(candidates, options.elements, options.rounds)
    if options.json:
        print(json.dumps({"elements": options.elements, "threads": 1, "figures": [asdict(each) for each in figures]}))
    else:
        Console().print(make_table(figures, options.elements))


if __name__ == "__main__":
    main()
