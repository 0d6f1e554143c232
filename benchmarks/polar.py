"""What orthogonalisation costs on the processor, beside torch.optim.Muon's own, on one thread.

    python benchmarks/polar.py [--shapes 512x512,512x1536,512x2048,2048x512] [--rounds 7] [--json]

Every round times each way once, in processor time, so that other programs disturb little; the best round counts. All
take five steps; torch's multiplies in bfloat16. `rate` counts the operations of the standard form whether a way needs
them or not, so that rates compare as times do.
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
from torch.optim._muon import _zeropower_via_newtonschulz

from windlass.accelerator.polar import COEFFICIENTS, standard_flops
from windlass.backends.cpu.polar import polar, polar_gram

JORDAN = COEFFICIENTS["jordan"]
SHAPES = "512x512,512x1536,512x2048,2048x512"  # of a layer of width 512: projection, q|k|v, and the two of its MLP


@dataclass(frozen=True)
class Figure:
    """What one way took for one matrix in its best round."""

    rows: int
    columns: int
    way: str
    milliseconds: float
    rate: float  # 1e9 operations of the standard form per second


def list_ways(matrix: Tensor) -> dict[str, Callable[[], object]]:
    """By name: torch's, and ours in each dtype and form."""
    narrow, wide = matrix.to(torch.bfloat16)[None], matrix[None]
    return {
        "torch": lambda: _zeropower_via_newtonschulz(narrow[0], JORDAN[0], len(JORDAN), 1e-7),
        "polar, bf16": lambda: polar(narrow, JORDAN, product_dtype=torch.bfloat16),
        "polar, fp32": lambda: polar(wide, JORDAN),
        "polar_gram, fp32": lambda: polar_gram(wide, JORDAN),
    }


def measure(shapes: list[tuple[int, int]], rounds: int) -> list[Figure]:
    """The best of `rounds` after one that is not counted."""
    random = torch.Generator().manual_seed(0)
    figures = []
    for rows, columns in shapes:
        ways = list_ways(torch.randn(rows, columns, generator=random))
        best = dict.fromkeys(ways, float("inf"))
        for number in range(rounds + 1):
            for way, run in ways.items():
                begin = time.process_time()
                run()
                seconds = time.process_time() - begin
                if number > 0:
                    best[way] = min(best[way], seconds)
        work = standard_flops(rows, columns, len(JORDAN))
        figures += [Figure(rows, columns, way, 1e3 * seconds, work / seconds / 1e9) for way, seconds in best.items()]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="rows x columns, by commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shapes = [
        (int(rows), int(columns)) for rows, _, columns in (one.partition("x") for one in options.shapes.split(","))
    ]
    figures = measure(shapes, options.rounds)
    if options.json:
        print(json.dumps([asdict(figure) for figure in figures], indent=2))
        return
    table = Table("matrix", "way", "ms", "rate, GFLOP/s", box=None, pad_edge=False)
    for figure in figures:
        shape = f"{figure.rows} x {figure.columns}"
        table.add_row(shape, figure.way, f"{figure.milliseconds:.1f}", f"{figure.rate:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
