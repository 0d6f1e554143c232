"""Save and load training state: raw bytes per rank and one JSON manifest; any number of ranks, any stage.

A tensor is stored as boxes: elements [start, stop) of the flat logical tensor -> file, offset, checksum. A loader
reads the boxes that intersect what it owns, whoever wrote them. The checkpoint is written beside its final place
and renamed, so a crash leaves the last one valid.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator
from windlass.core.exchange import gather_json
from windlass.core.plan import Region
from windlass.core.specs import dtype_from_name, dtype_name
from windlass.core.state import WEIGHT, ModelState

logger = logging.getLogger("windlass")

FORMAT = (1, 0)
LATEST = "latest"
MANIFEST = "manifest.json"
BUFFER = "buffer"
_ALIGN = 128


def save_checkpoint(directory: Path, tag: str, state: ModelState, extra: dict[str, Any]) -> None:
    """Write `directory/tag`. `extra` is JSON-ready and the same on every rank. A collective."""
    accelerator, group = state.accelerator, state.group
    try:
        json.dumps(extra)
    except TypeError as cause:
        raise ValueError(
            f"the state to save is not JSON: {cause}; keep tensors and objects out of client_state"
        ) from cause
    final, partial = directory / tag, directory / f"{tag}.tmp"
    problem = ""
    if group.rank == 0:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as cause:
            problem = str(cause)
    _agree(state, problem, f"cannot create {partial}")
    entries: list[dict[str, Any]] = []
    try:
        with (partial / f"rank{group.rank:05d}.bin").open("wb") as file:
            for name, key, shape, start, part in _owned_parts(state):
                data = accelerator.to_bytes(part)
                offset = -(-file.tell() // _ALIGN) * _ALIGN
                file.seek(offset)
                file.write(data)
                entries.append({
                    "name": name, "key": key, "shape": shape, "dtype": dtype_name(part.dtype), "start": start,
                    "stop": start + part.numel(), "file": f"rank{group.rank:05d}.bin", "offset": offset,
                    "length": len(data), "crc32": zlib.crc32(data),
                })  # fmt: skip
            file.flush()
            os.fsync(file.fileno())
    except OSError as cause:
        problem = str(cause)
    _agree(state, problem, f"cannot write {partial}")
    rng = base64.b64encode(accelerator.to_bytes(accelerator.rng_state())).decode()
    gathered = gather_json(accelerator, group, {"entries": entries, "rng": rng})
    if group.rank == 0:
        try:
            _commit(final, partial, directory / LATEST, {
                "format": list(FORMAT),
                "plan": {"hash": state.plan.hash, "stage": state.plan.stage, "ranks": group.size},
                "steps": dict(state.steps),
                "rng": [one["rng"] for one in gathered],
                "rng_of": _kind(accelerator),
                "tensors": [entry for one in gathered for entry in one["entries"]],
                **extra,
            })  # fmt: skip
        except OSError as cause:
            problem = str(cause)
    _agree(state, problem, f"cannot commit {final}")


def load_checkpoint(directory: Path, tag: str | None, state: ModelState) -> dict[str, Any]:
    """Read a checkpoint into the state; returns the manifest. Every rank reads only what it owns.

    Raises FileNotFoundError if there is none, ValueError for names or shapes that do not fit and for damaged bytes,
    before anything has been changed by a mismatch of names or shapes.
    """
    manifest, path = read_manifest(directory, tag)
    boxes: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in manifest["tensors"]:
        boxes.setdefault((entry["name"], entry["key"]), []).append(entry)
    _check_fit(boxes, state, path)
    anew = _find_new_state(boxes, state, path)
    for region in state.plan.regions:
        for placement in region.placements:
            for key in (WEIGHT, *state.moment_keys(region)):
                if key != WEIGHT and placement.name in anew:
                    state.write(placement.name, key, torch.zeros(placement.shape))
                    continue
                found = boxes[placement.name, key]
                state.write(placement.name, key, _read(path, found, _needed(state, region, key), placement.start))
    covered = set(state.plan.placement_by_name)
    loose: dict[tuple[str, str], Tensor]
    loose = {(name, WEIGHT): one for name, one in state.module.named_parameters() if name not in covered}
    loose.update({(name, BUFFER): one for name, one in state.module.named_buffers()})
    for where, tensor in loose.items():
        if where in boxes:
            total = max(entry["stop"] for entry in boxes[where])
            with torch.no_grad():
                tensor.copy_(_assemble(path, boxes[where], 0, total).view(tensor.shape))
    for name, count in manifest["steps"].items():
        if name in state.steps:
            state.steps[name] = 0 if name in anew else int(count)
    if manifest.get("rng_of", _kind(state.accelerator)) != _kind(state.accelerator):
        logger.info("random numbers do not continue: checkpoint %s is of %s", path, manifest["rng_of"])
    elif state.group.rank < len(manifest["rng"]):
        raw = bytearray(base64.b64decode(manifest["rng"][state.group.rank]))
        state.accelerator.set_rng_state(torch.frombuffer(raw, dtype=torch.uint8))
    return manifest


def _kind(accelerator: Accelerator) -> str:
    """ "cuda" of "cuda:1": random states mean something to the same kind of accelerator only."""
    return accelerator.name.partition(":")[0]


def read_manifest(directory: Path, tag: str | None) -> tuple[dict[str, Any], Path]:
    """The manifest of `tag`, or of the latest checkpoint, and the folder it lies in."""
    if tag is None:
        pointer = directory / LATEST
        if not pointer.is_file():
            raise FileNotFoundError(f"there is no checkpoint in {directory}: no file named {LATEST!r}")
        tag = pointer.read_text().strip()
    path = directory / tag
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError as cause:
        raise FileNotFoundError(f"there is no checkpoint {tag!r} in {directory}") from cause
    except json.JSONDecodeError as cause:
        raise ValueError(f"the manifest of checkpoint {path} is damaged: {cause}") from cause
    if manifest["format"][0] != FORMAT[0]:
        raise ValueError(
            f"checkpoint {path} has format {manifest['format']}, this version reads {FORMAT[0]}.x; "
            "load it with the version that wrote it"
        )
    return manifest, path


def _owned_parts(state: ModelState) -> Iterator[tuple[str, str, list[int], int, Tensor]]:
    """(name, key, logical shape, first element, values) of what this rank writes: its shard of everything."""
    rank = state.group.rank
    for region in state.plan.regions:
        low, high = region.shard_bounds(rank)
        for key, device_values, first in _region_values(state, region):
            values = state.accelerator.to_host(device_values)  # once: a slice of it each would cost a lazy device more
            for placement in region.placements:
                start, stop = max(low, placement.start), min(high, placement.stop)
                if start < stop or (placement.numel == 0 and rank == 0):
                    part = values[start - first : stop - first] if start < stop else values[:0]
                    yield placement.name, key, list(placement.shape), max(0, start - placement.start), part
    if rank == 0:
        covered = set(state.plan.placement_by_name)
        for name, buffer in state.module.named_buffers():
            yield name, BUFFER, list(buffer.shape), 0, buffer.detach().reshape(-1)
        for name, parameter in state.module.named_parameters():
            if name not in covered:
                yield name, WEIGHT, list(parameter.shape), 0, parameter.detach().reshape(-1)


def _region_values(state: ModelState, region: Region) -> Iterator[tuple[str, Tensor, int]]:
    """(key, values, the region element they begin at)."""
    if not region.trainable:
        first = 0 if state.resident else region.shard_bounds(state.group.rank)[0]
        yield WEIGHT, state.weights[region.name], first
        return
    first = state.owned_bounds(region)[0]
    yield WEIGHT, state.owned_fp32(region), first
    for key in state.moment_keys(region):
        yield key, state.moments[region.name][key], first


def _check_fit(boxes: dict[tuple[str, str], list[dict[str, Any]]], state: ModelState, path: Path) -> None:
    wanted = {name: tuple(parameter.shape) for name, parameter in state.module.named_parameters()}
    saved = {name: tuple(found[0]["shape"]) for (name, key), found in boxes.items() if key == WEIGHT}
    missing, unknown = sorted(set(wanted) - set(saved)), sorted(set(saved) - set(wanted))
    if missing or unknown:
        told = [
            f"lacks {', '.join(missing[:3])}" if missing else "",
            f"has {', '.join(unknown[:3])}" if unknown else "",
        ]
        raise ValueError(
            f"checkpoint {path} does not fit the model: it {' and '.join(one for one in told if one)} "
            f"({len(missing)} missing, {len(unknown)} unknown); load it into the model that it was saved from"
        )
    for name, shape in wanted.items():
        if saved[name] != shape:
            raise ValueError(f"checkpoint {path} has {name!r} of shape {saved[name]}, the model wants {shape}")


def _find_new_state(boxes: Mapping[tuple[str, str], object], state: ModelState, path: Path) -> set[str]:
    """Parameters that were frozen, or had another optimizer: what it keeps begins at zero, and so does their count of
    updates, from which bias correction follows; their weights go on."""
    missing = [
        placement.name
        for region in state.plan.regions
        for placement in region.placements
        if any((placement.name, key) not in boxes for key in state.moment_keys(region))
    ]
    if missing and state.group.rank == 0:
        logger.info(
            "checkpoint %s holds no state of this optimizer for %d parameters, %s first: it begins anew for them",
            path,
            len(missing),
            missing[0],
        )
    return set(missing)


def _needed(state: ModelState, region: Region, key: str) -> tuple[int, int]:
    """Elements of the region that this rank holds for a key."""
    if key == WEIGHT:
        return (0, region.numel) if state.resident else region.shard_bounds(state.group.rank)
    return state.owned_bounds(region)


def _read(path: Path, found: list[dict[str, Any]], needed: tuple[int, int], first: int) -> Tensor:
    """A whole logical tensor, of which only the needed part of its region has been read; the rest is zero."""
    shape = found[0]["shape"]
    total = max(entry["stop"] for entry in found)
    start, stop = max(0, needed[0] - first), min(total, needed[1] - first)
    whole = torch.zeros(total, dtype=dtype_from_name(found[0]["dtype"]))
    if start < stop:
        whole[start:stop] = _assemble(path, found, start, stop)
    return whole.view(shape)


def _assemble(path: Path, found: list[dict[str, Any]], start: int, stop: int) -> Tensor:
    """Elements [start, stop) from the boxes that hold them, each verified."""
    values = torch.empty(max(0, stop - start), dtype=dtype_from_name(found[0]["dtype"]))
    filled = 0
    for entry in found:
        low, high = max(start, entry["start"]), min(stop, entry["stop"])
        if low >= high:
            continue
        with (path / entry["file"]).open("rb") as file:
            file.seek(entry["offset"])
            data = file.read(entry["length"])
        if len(data) != entry["length"] or zlib.crc32(data) != entry["crc32"]:
            raise ValueError(
                f"checkpoint {path} is damaged: {entry['key']} of {entry['name']!r} in {entry['file']} does not have "
                "the checksum of its manifest; load an older checkpoint"
            )
        box = torch.frombuffer(bytearray(data), dtype=values.dtype)
        values[low - start : high - start] = box[low - entry["start"] : high - entry["start"]]
        filled += high - low
    if filled != max(0, stop - start):
        raise ValueError(f"checkpoint {path} holds {filled} of {stop - start} elements of {found[0]['name']!r}")
    return values


def _commit(final: Path, partial: Path, latest: Path, manifest: dict[str, Any]) -> None:
    with (partial / MANIFEST).open("w") as file:
        json.dump(manifest, file)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(partial)
    old = final.with_name(f"{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    pointer = latest.with_name(f"{LATEST}.tmp")
    with pointer.open("w") as file:
        file.write(final.name)
        file.flush()
        os.fsync(file.fileno())
    pointer.replace(latest)
    _sync_folder(latest.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _agree(state: ModelState, problem: str, action: str) -> None:
    """Raise OSError on every rank if one of them has a problem."""
    problems = gather_json(state.accelerator, state.group, problem)
    for rank, one in enumerate(problems):
        if one:
            raise OSError(f"{action}: {one} (on rank {rank}); the checkpoints that were there are untouched")
