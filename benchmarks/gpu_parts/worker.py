"""The side of a part that runs in a process of its own: its items one after the other, each told before it begins.

An item that raises is a row with an error. One that loses the device ends the process with `LOST`, and one that hangs
is ended by the driver; in both cases the driver starts the part again without it.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch

import windlass
from gpu_parts.context import Context, DeviceLost, Scale
from gpu_parts.rows import EventWriter, Row, describe_error

LOST: Final = 75
_LONG_SECONDS: Final = 50.0  # of one item, after which the log is told where it is: it may hang, and is ended then
Item = tuple[str, Callable[[Context], Iterator[Row]]]

PARTS: Final = {
    "rates": ("link_rates",),
    "kernels": ("vector_kernels", "matrix_kernels", "model_kernels"),
    "training": ("training", "muon_step"),
}
"""Which modules hold the items of a part, as a sequence `ITEMS`."""


def run_worker(part: str, accelerator_name: str, scale: Scale, events: Path, done: Sequence[str]) -> int:
    """Run the items of a part that are not `done`; the exit status."""
    faulthandler.enable()
    writer = EventWriter(events)
    items = [item for module in PARTS[part] for item in importlib.import_module(f"gpu_parts.{module}").ITEMS]
    try:
        accelerator = windlass.open_accelerator(accelerator_name)
    except Exception as error:
        writer.write("failed", message=describe_error(error))
        return 1
    context = Context(accelerator, scale)
    writer.write("facts", **describe_device(context))
    try:
        for name, measure in items:
            if name not in done:
                writer.write("begin", item=name)
                faulthandler.dump_traceback_later(_LONG_SECONDS)
                _run_item(context, part, name, measure, writer)
                faulthandler.cancel_dump_traceback_later()
                writer.write("end", item=name)
    except DeviceLost as error:
        writer.write("lost", message=str(error))
        return LOST
    writer.write("finished")
    accelerator.close()
    return 0


def describe_device(context: Context) -> dict[str, object]:
    """What the report says of the device and of the software, JSON-ready."""
    accelerator = context.accelerator
    versions = {"windlass": windlass.__version__, "torch": torch.__version__, "python": platform.python_version()}
    try:
        versions["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        versions["triton"] = "not installed"
    return {
        "accelerator": accelerator.name,
        "facts": dict(accelerator.facts),
        "capabilities": asdict(accelerator.capabilities),
        "kernels": accelerator.kernels.chosen(),
        "versions": versions,
    }


def _run_item(
    context: Context, part: str, name: str, measure: Callable[[Context], Iterator[Row]], writer: EventWriter
) -> None:
    torch.manual_seed(0)
    try:
        for row in measure(context):
            writer.write("row", row=row.to_json())
    except DeviceLost:
        raise
    except Exception as error:
        writer.write("row", row=Row(part, name, "", "", error=describe_error(error)).to_json())
        context.require_health(error)
    try:
        context.release()
    except RuntimeError as error:
        raise DeviceLost(describe_error(error)) from error
