"""What a step of Llama 3 costs more with Muon than with AdamW, on 8 to 256 ranks, by the planner and a cost model.

    .venv/bin/python benchmarks/muon_scaling.py
    .venv/bin/python benchmarks/muon_scaling.py --models 70B --ranks 64,256 --link 25 --json

Nothing here is a measurement of a large machine. The plans are those by which windlass would train: operations and
bytes are theirs, and a scaled-down model, really trained on 8 simulated devices, shows that the bytes counted are the
bytes planned. Seconds are operations and bytes over the rates that you give.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scaling_parts.counting import Count, count_on_sim
from scaling_parts.pricing import Machine, Price, price

MOST_OVER_FORMULA = 1.02


def make_table(prices: Sequence[Price], machine: Machine) -> Table:
    """The prices for people."""
    table = Table(
        title="Muon beyond AdamW, per optimizer step",
        caption=(
            f"Newton-Schulz at {machine.newton_schulz_share:.0%} of {machine.peak_flop_per_s / 1e12:.0f} TFLOP/s, "
            f"{machine.link_bytes_per_s / 1e9:.0f} GB/s into a rank, steps of {machine.tokens / 1e6:g} M tokens at "
            f"{machine.training_share:.0%} MFU; the busiest rank's figures"
        ),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", no_wrap=True)
    for heading in (
        "stage", "ranks", "TFLOP", "balance", "work ms", "AdamW GB", "more GB", "of formula", "padding", "link ms",
        "calls", "step s", "in turn", "side by side",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for one in prices:
        of_formula = f"{one.exchanged_bytes / one.formula_bytes:.2f}" if one.exchanged_bytes else "0"
        table.add_row(
            one.model, str(one.stage), str(one.ranks), f"{one.flops / 1e12:.1f}", f"{one.balance:.2f}",
            f"{one.work_s * 1e3:.1f}", f"{one.adamw_bytes / 1e9:.1f}", f"{one.extra_bytes / 1e9:.2f}", of_formula,
            f"{one.padding:.1%}", f"{one.link_s * 1e3:.1f}", str(one.calls), f"{one.step_s:.2f}", f"{one.alone:.2%}",
            f"{one.overlapped:.2%}",
        )  # fmt: skip
    return table


def describe_count(count: Count) -> str:
    """A line for people."""
    calls = sorted({sum(calls for calls, _ in traffic.values()) for traffic in count.counted})
    verdict = "as planned on every rank" if count.as_planned else f"NOT as planned: {count.planned[0]}"
    return (
        f"counted on {len(count.counted)} simulated devices, stage {count.stage}: {count.mean_bytes:.0f} bytes a rank "
        f"and step in {' or '.join(map(str, calls))} calls, {verdict}; the formula allows {count.formula_bytes:.0f}"
    )


def is_wrong(count: Count) -> bool:
    """Whether the counters contradict the plan, or the plan the formula."""
    return not count.as_planned or count.mean_bytes > MOST_OVER_FORMULA * count.formula_bytes


def main(
    models: Annotated[str, typer.Option(help="8B, 70B, small.")] = "8B,70B",
    ranks: Annotated[str, typer.Option(help="Numbers of ranks.")] = "8,16,32,64,128,256",
    stages: Annotated[str, typer.Option(help="ZeRO stages.")] = "2,3",
    peak: Annotated[float, typer.Option(help="TFLOP/s of a rank.")] = 989.0,
    share: Annotated[float, typer.Option(help="Of the peak, in Newton-Schulz.")] = 0.6,
    mfu: Annotated[float, typer.Option(help="Of the peak, in forward and backward.")] = 0.4,
    link: Annotated[float, typer.Option(help="GB/s into a rank.")] = 50.0,
    tokens: Annotated[float, typer.Option(help="Millions of a step, over all ranks.")] = 4.0,
    count_ranks: Annotated[int, typer.Option(min=0, help="Simulated devices that really train; 0: none.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON in the place of tables.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the JSON there too.")] = None,
) -> None:
    """Price Muon on large machines."""
    machine = Machine(peak * 1e12, share, mfu, link * 1e9, tokens * 1e6)
    prices = [
        price(model, int(stage), int(number), machine)
        for model in models.split(",")
        for stage in stages.split(",")
        for number in ranks.split(",")
    ]
    counts = count_on_sim([int(stage) for stage in stages.split(",")], count_ranks) if count_ranks else []
    content = {
        "machine": asdict(machine),
        "prices": [asdict(one) | {"alone": one.alone, "overlapped": one.overlapped} for one in prices],
        "counts": [asdict(one) | {"as_planned": one.as_planned, "mean_bytes": one.mean_bytes} for one in counts],
    }
    text = json.dumps(content, indent=1) + "\n"
    if out is not None:
        out.write_text(text, encoding="utf-8")
    console = Console(width=160)
    if as_json:
        print(text, end="")
    else:
        console.print(make_table(prices, machine))
        for count in counts:
            console.print(describe_count(count), highlight=False)
    if wrong := [f"stage {count.stage}" for count in counts if is_wrong(count)]:
        raise SystemExit(f"the counters contradict the plan or the formula at {', '.join(wrong)}")


if __name__ == "__main__":
    typer.run(main)
