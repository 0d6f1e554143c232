"""What was measured of orthogonalisation on this machine, kept in the user's cache folder from run to run.

One JSON file holds a list of records, one per device, number of threads and version. It is never needed: a file that is
missing or damaged counts as empty, and one that cannot be written is not written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

import torch

import windlass
from windlass.accelerator.environment import read_environment
from windlass.accelerator.interface import Accelerator

FILE: Final = "polar.json"
Record = dict[str, Any]
"""``device``: what `describe_device` says; ``products`` and ``forms``: see `polar_choice`."""


def default_folder() -> Path | None:
    """$XDG_CACHE_HOME/windlass or ~/.cache/windlass; None for a user without a home."""
    try:
        return Path(read_environment().cache_home or "~/.cache").expanduser() / "windlass"
    except RuntimeError:
        return None


def describe_device(accelerator: Accelerator) -> dict[str, Any]:
    """All that times depend on, JSON-ready: the device, how many share it, threads, kernels, versions."""
    chosen = accelerator.kernels.chosen()
    return {
        "accelerator": accelerator.name.partition(":")[0],
        "model": str(accelerator.facts.get("model", accelerator.device.type)),
        "threads": torch.get_num_threads(),
        "ranks_on_host": accelerator.facts.get("ranks_on_host", 1),
        "kernels": [chosen["polar"], chosen["polar_gram"]],
        "torch": torch.__version__,
        "windlass": windlass.__version__,
    }


def read_record(folder: Path | None, device: dict[str, Any]) -> Record:
    """The record of this device, an empty one if there is none."""
    for record in _read(folder):
        if record["device"] == device:
            return record
    return {"device": device, "products": {}, "forms": {}}


def read_similar(folder: Path | None, device: dict[str, Any]) -> list[Record]:
    """All records of this model of device with these versions, however many threads and ranks there were."""
    free = ("threads", "ranks_on_host")
    return [
        record
        for record in _read(folder)
        if all(record["device"].get(name) == value for name, value in device.items() if name not in free)
    ]


def write_record(folder: Path | None, record: Record) -> None:
    """Put a record in the place of the one of its device."""
    if folder is None:
        return
    others = [other for other in _read(folder) if other["device"] != record["device"]]
    temporary = folder / f"{FILE}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps([*others, record], indent=1) + "\n")
        temporary.replace(folder / FILE)
    except OSError:  # the next run measures again
        return


def _read(folder: Path | None) -> list[Record]:
    if folder is None:
        return []
    try:
        found = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError):
        return []
    return [one for one in found if _is_record(one)] if isinstance(found, list) else []


def _is_record(value: object) -> bool:
    """Whether it has the parts of a record, so that a file of another version or another hand does no harm."""
    if not isinstance(value, dict) or not all(isinstance(value.get(k), dict) for k in ("device", "products", "forms")):
        return False
    products, forms = value["products"], value["forms"]
    return all(isinstance(seconds, float) for seconds in products.values()) and all(
        isinstance(one, dict)
        and one.get("form") in ("standard", "gram")
        and all(isinstance(one.get(form), float | None) for form in ("standard", "gram"))
        for one in forms.values()
    )
