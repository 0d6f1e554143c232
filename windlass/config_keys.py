"""Sorting the keys of a file by their class: what is passed on, what is reported, what stops the run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from windlass.config_absent import NOT_YET, REFUSED, NotYet, Refused
from windlass.config_errors import quote, suggest
from windlass.deepspeed_keys import (
    ADAM_PARAMS,
    ALIASES,
    DONE,
    IGNORED,
    MUON_PARAMS,
    OPTIMIZERS_DONE,
    OPTIMIZERS_NOT_YET,
    OPTIMIZERS_REFUSED,
    OWN,
)


def _names_by_section() -> dict[str, set[str]]:
    sections: dict[str, set[str]] = defaultdict(set)
    for path in (*DONE, *OWN, *IGNORED, *NOT_YET, *REFUSED, *ALIASES):
        parts = path.split(".")
        for depth, name in enumerate(parts):
            sections[".".join(parts[:depth])].add(name)
    return dict(sections)


_USE = 'use "Adam", "AdamW" or "Muon"'
_NAMES = _names_by_section()  # "" -> top-level names, "fp16" -> the names inside fp16, ...


@dataclass
class SortedKeys:
    """What became of the keys of one file."""

    done: dict[str, object] = field(default_factory=dict)  # nested as in the file, for validation
    auto: list[str] = field(default_factory=list)  # paths given as "auto"
    problems: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    absent: dict[str, list[str]] = field(default_factory=dict)  # what happens instead -> paths
    notes: list[str] = field(default_factory=list)

    def messages(self) -> list[str]:
        """Word the ignored keys as one line, and those not done yet as one line for each thing that happens instead."""
        lines = list(self.notes)
        if self.ignored:
            lines.append(f"info: ignored, the plan decides and results are the same: {', '.join(self.ignored)}")
        for instead, paths in self.absent.items():
            lines.append(f"warning: {', '.join(paths)} {'is' if len(paths) == 1 else 'are'} not done yet: {instead}")
        return lines


def sort_keys(content: Mapping[str, object]) -> SortedKeys:
    """Sort the whole file; nothing is raised, so that all problems can be told at once."""
    result = SortedKeys()
    _visit(content, "", result.done, result)
    return result


def _visit(section: Mapping[str, object], prefix: str, done: dict[str, object], result: SortedKeys) -> None:
    seen: dict[str, str] = {}
    for name, value in section.items():
        given = f"{prefix}.{name}" if prefix else name
        path = ALIASES.get(given, given)
        if name not in _NAMES[prefix]:
            if "*" not in _NAMES[prefix]:
                result.problems.append(_unknown(name, prefix))
                continue
            path = f"{prefix}.*"
        elif path in seen:
            result.problems.append(f"{seen[path]} and {given} are one key, keep {path}")
            continue
        else:
            seen[path] = given
        _sort_one(given, path, value, done, result)


def _sort_one(given: str, path: str, value: object, done: dict[str, object], result: SortedKeys) -> None:
    name = given.rpartition(".")[2] if path.endswith(".*") else path.rpartition(".")[2]
    carried_out = DONE.get(path) or OWN.get(path)
    absent = NOT_YET.get(path) or REFUSED.get(path)
    default = carried_out.default if carried_out else absent.default if absent else None
    if value == "auto" and default != "auto":
        if absent is None or absent.switch is None:
            result.auto.append(given if path.endswith(".*") else path)
    elif carried_out:
        if value is not None or default is not None or path.endswith(".*"):
            done[name] = value
    elif path in IGNORED:
        result.ignored.append(given)
    elif absent:
        _report(given, path, value, absent, result)
    else:
        _enter(given, path, value, done, result)


def _unknown(name: str, prefix: str) -> str:
    path = f"{prefix}.{name}" if prefix else name
    hint = suggest(name, _NAMES[prefix], prefix=f"{prefix}." if prefix else "")
    for table in ((*DONE, *OWN), (*IGNORED, *NOT_YET, *REFUSED)):
        misplaced = [other for other in table if other.rpartition(".")[2] == name]
        if len(misplaced) == 1:  # the right name in the wrong section
            hint = f" (did you mean '{misplaced[0]}'?)"
            break
    return f"unknown key '{path}'{hint or ', remove it'}"


def _enter(given: str, path: str, value: object, done: dict[str, object], result: SortedKeys) -> None:
    """Go into a section, unless it is null or does not describe one."""
    if path == "zero_optimization" and isinstance(value, bool):
        stage = int(value)
        result.notes.append(f"info: zero_optimization = {quote(value)} is the old form of stage {stage}")
        value = {"stage": stage}
    if value is None:
        return
    if not isinstance(value, Mapping):
        result.problems.append(f"{given} must be an object, got {quote(value)}")
        return
    if path == "optimizer" and (problem := _optimizer_problem(value)):
        result.problems.append(problem)
        return  # the parameters of another optimizer are not ours to judge
    if path == "optimizer":
        value = _without_strangers(value, result)
    inner: dict[str, object] = {}
    _visit(value, path, inner, result)
    if any(key == path or key.startswith(f"{path}.") for key in (*DONE, *OWN)):
        done[path.rpartition(".")[2]] = inner


def _optimizer_problem(section: Mapping[str, object]) -> str | None:
    kind = section.get("type")
    if kind == "auto" or (kind is not None and not isinstance(kind, str)):
        return None
    if kind is None:
        return 'optimizer.type is missing, add "type": "AdamW"' if section.get("params") else None
    lower = kind.lower()
    if lower in OPTIMIZERS_DONE:
        return None
    if lower in OPTIMIZERS_NOT_YET:
        return f"optimizer.type = {quote(kind)} is not done yet: {_USE}"
    if lower in OPTIMIZERS_REFUSED:
        return f"optimizer.type = {quote(kind)} is refused: gradients are not compressed, {_USE}"
    advice = suggest(kind, ("Adam", "AdamW", "Muon"), quoting='"') or f", {_USE}"
    return f"optimizer.type = {quote(kind)} is unknown{advice}"


def _without_strangers(section: Mapping[str, object], result: SortedKeys) -> Mapping[str, object]:
    """The section without the parameters of the other optimizer, each of which is reported."""
    params, kind = section.get("params"), section.get("type")
    if not isinstance(params, Mapping):
        return section
    is_muon = isinstance(kind, str) and kind.lower() == "muon"
    strangers = ADAM_PARAMS if is_muon else MUON_PARAMS
    for name in strangers:
        if params.get(name) is not None:
            said = f"optimizer.params.{name} belongs to "
            if is_muon:
                said += "Adam: remove it, beside Muon weights are decayed as by AdamW"
            else:
                said += f'Muon, and optimizer.type is {quote(kind or "AdamW")}: remove it, or use "Muon"'
            result.problems.append(said)
    return {**section, "params": {name: value for name, value in params.items() if name not in strangers}}


def _report(given: str, path: str, value: object, entry: NotYet | Refused, result: SortedKeys) -> None:
    """Word a key that windlass does not carry out, if it asks for anything, and check the names below it."""
    is_section = path in _NAMES
    off = value is None or value == entry.default
    if is_section:
        off = not value or (isinstance(value, Mapping) and value.get("enabled") is False)
    if entry.switch is None and not off:
        shown = given if is_section else f"{given} = {quote(value)}"
        if isinstance(entry, Refused):
            result.problems.append(f"{shown} is refused: {entry.alternative}")
        elif entry.changes_meaning:
            result.problems.append(f"{shown} is not done yet: {entry.instead}")
        else:
            result.absent.setdefault(entry.instead, []).append(given)
    if is_section and isinstance(value, Mapping):
        _visit(value, path, {}, result)
