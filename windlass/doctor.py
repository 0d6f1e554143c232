"""What windlass sees on this machine: one row per installed backend, and which one would be used.

A broken plugin becomes a row with its reason; nothing here raises for it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import windlass
from windlass.accelerator.environment import read_environment
from windlass.accelerator.errors import WindlassError
from windlass.accelerator.hookspecs import Probe
from windlass.accelerator.interface import INTERFACE_VERSION, Accelerator
from windlass.accelerator.plugins import KERNELS, Candidate, candidates, describe_cause
from windlass.accelerator.registry import FALLBACK, Choice, Registry

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

VARIABLES = ("WINDLASS_ACCELERATOR", "WINDLASS_BACKENDS")


def collect_report() -> dict[str, Any]:
    """Everything `render` shows, as JSON-ready data.

    ``windlass``, ``interface``, ``python``, ``torch``, ``platform``: versions. ``variables``: those that
    steer the choice and are set. ``backends``: a row per candidate with ``name, distribution, version,
    usable, reason, real_device, runtime, devices``, and, of its first device where it opened,
    ``capabilities, kernels, facts`` and ``polar``: what `windlass.polar_choice` has measured on such devices, a
    record for each number of threads and ranks. ``kernel_packages``: a row per package of kernels with ``name,
    distribution, version, reason``. ``choice``: ``accelerator`` (None if nothing can be used) and ``why``.

    Usable backends are opened, except in a rank of a larger job, where opening may wait for the others.
    """
    report: dict[str, Any] = {
        "windlass": windlass.__version__,
        "interface": ".".join(map(str, INTERFACE_VERSION)),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "platform": platform.platform(),
        "variables": {name: os.environ[name] for name in VARIABLES if os.environ.get(name)},
        "backends": [],
        "kernel_packages": [],
    }
    try:
        registry = Registry(read_environment())
    except ValueError as error:  # a variable that cannot be read: nothing can be chosen until it is mended
        report["backends"] = [_row(candidate, str(error)) for candidate in candidates()]
        report["choice"] = {"accelerator": None, "why": str(error)}
        return report
    report["backends"] = [_examine(registry, candidate) for candidate in registry.candidates]
    tried = any(row["capabilities"] for row in report["backends"])
    for candidate in candidates(KERNELS):
        failure = registry.kernel_failures.get(candidate)
        reason = describe_cause(failure) if failure else "" if tried else "not tried, because no backend was opened"
        row = {"name": candidate.name, "distribution": candidate.distribution, "version": candidate.version}
        report["kernel_packages"].append(row | {"reason": reason})
    report["choice"] = _choose(registry, report["backends"])
    plain: dict[str, Any] = json.loads(json.dumps(report, default=str))
    return plain


def _row(candidate: Candidate, reason: str) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "distribution": candidate.distribution,
        "version": candidate.version,
        "usable": False,
        "reason": reason,
        "real_device": False,
        "runtime": "",
        "devices": [],
        "capabilities": {},
        "kernels": {},
        "facts": {},
        "polar": [],
    }


def _examine(registry: Registry, candidate: Candidate) -> dict[str, Any]:
    probe = registry.examine(candidate.name)
    if not isinstance(probe, Probe):
        return _row(candidate, str(probe))
    row = _row(candidate, probe.reason) | {
        "usable": probe.usable,
        "real_device": probe.real_device,
        "runtime": probe.version,
        "devices": probe.devices,
    }
    if not probe.usable:
        return row
    if registry.environment.num_ranks > 1:
        return row | {"reason": f"not opened by one of {registry.environment.num_ranks} ranks"}
    try:
        accelerator = registry.open(Choice(candidate.name, 0, "doctor", asked=True))
        try:
            return row | _describe(accelerator)
        finally:
            accelerator.close()
    except WindlassError as error:
        return row | {"usable": False, "reason": str(error)}
    except Exception as error:  # a device that opens and then cannot be described or closed
        return row | {"usable": False, "reason": f"backend {candidate.name!r} is broken: {describe_cause(error)}."}


def _describe(accelerator: Accelerator) -> dict[str, Any]:
    from windlass.polar_cache import default_folder, describe_device, read_similar

    return {
        "capabilities": asdict(accelerator.capabilities),
        "kernels": accelerator.kernels.chosen(),
        "facts": accelerator.facts,
        "polar": read_similar(default_folder(), describe_device(accelerator)),
    }


def _choose(registry: Registry, rows: list[dict[str, Any]]) -> dict[str, Any]:
    usable = {row["name"]: row["usable"] for row in rows}
    try:
        choice = registry.choose()
        if not choice.asked and not usable[choice.backend] and registry.environment.num_ranks == 1:
            choice = Choice(FALLBACK, None, f"{choice.backend!r} is {choice.why} but does not open", asked=False)
        index = registry.device_index(choice)
    except (WindlassError, ValueError) as error:
        return {"accelerator": None, "why": str(error)}
    if not usable[choice.backend]:
        reason = next(row["reason"] for row in rows if row["name"] == choice.backend)
        return {"accelerator": None, "why": reason}
    why = f"chosen by {choice.why}" if choice.asked else choice.why
    return {"accelerator": f"{choice.backend}:{index}", "why": why}


def render(report: dict[str, Any], console: Console) -> None:
    """Print a report of `collect_report` for a person: a table, what each usable backend offers, the choice."""
    from rich.table import Table
    from rich.text import Text

    console.print(
        Text(
            f"windlass {report['windlass']} (interface {report['interface']}), Python {report['python']}, "
            f"torch {report['torch']}\n{report['platform']}"
        )
    )
    for name, value in report["variables"].items():
        console.print(Text(f"{name}={value}"))

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(1, 2, 0, 0))
    for column in ("Backend", "Package", "Usable", "Devices, or why not"):
        table.add_column(column, overflow="fold")
    for row in report["backends"]:
        cells: list[RenderableType] = [Text(row["name"]), Text(f"{row['distribution']} {row['version']}")]
        cells.append(Text("yes", style="green") if row["usable"] else Text("no", style="red"))
        devices = [f"{row['name']}:{index}  {device}" for index, device in enumerate(row["devices"])]
        lines = [*devices, row["reason"]] if row["usable"] else [row["reason"]]
        cells.append(Text("\n".join(line for line in lines if line)))
        table.add_row(*cells)
    console.print(table)

    for row in report["backends"]:
        if row["capabilities"]:
            console.print(Text(f"\n{row['name']}", style="bold"), Text(f"on {row['runtime']}"))
            console.print(_offer(row))
    for row in report["kernel_packages"]:
        state = row["reason"] or "loaded"
        console.print(Text(f"\nkernels of {row['distribution']} {row['version']}: {state}"))

    choice = report["choice"]
    if choice["accelerator"] is None:
        console.print(Text(f"\nNothing would be used: {choice['why']}", style="bold red"))
    else:
        console.print(Text(f"\n{choice['accelerator']} would be used: {choice['why']}.", style="bold"))


def _offer(row: dict[str, Any]) -> RenderableType:
    """What one opened backend offers: capabilities, kernels, facts."""
    from rich.table import Table
    from rich.text import Text

    declared = {name: value for name, value in row["capabilities"].items() if value}
    flags = [name for name, value in declared.items() if value is True]
    values = [f"{name} {', '.join(map(str, value))}" for name, value in declared.items() if isinstance(value, list)]
    grid = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 2))
    grid.add_row("capabilities", Text(", ".join(flags) or "none beyond the mandatory core"))
    for value in values:
        grid.add_row("", Text(value))
    grid.add_row("kernels", Text(", ".join(f"{name}: {chosen}" for name, chosen in row["kernels"].items())))
    if row["facts"]:
        grid.add_row("facts", Text(", ".join(f"{name} {value}" for name, value in row["facts"].items())))
    for record in row["polar"]:
        grid.add_row("Muon", Text(_say_measured(record)))
    return grid


def _say_measured(record: dict[str, Any]) -> str:
    """One line: threads and ranks, dtypes of products, forms by shape, each with what was measured."""
    device = record["device"]
    parts = [f"{dtype} {1e3 * seconds:.3g} ms" for dtype, seconds in record["products"].items()]
    for shape, measured in record["forms"].items():
        times = [f"{form} {1e3 * measured[form]:.3g} ms" for form in ("standard", "gram") if measured[form]]
        parts.append(f"{shape}: {measured['form']} ({', '.join(times) or 'not measured'})")
    return f"threads {device['threads']}, ranks on the host {device['ranks_on_host']}: {'; '.join(parts)}"
