"""Installed plugins: listing them reads metadata only, loading one imports it alone and asks its hooks."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import pluggy

from windlass.accelerator import hookspecs
from windlass.accelerator.errors import InterfaceMismatch
from windlass.accelerator.hookspecs import PROJECT, Probe
from windlass.accelerator.interface import INTERFACE_VERSION, Accelerator
from windlass.accelerator.kernels import Kernel

BACKENDS: Final = "windlass.backends"
KERNELS: Final = "windlass.kernels"


@dataclass(frozen=True)
class Candidate:
    """One installed plugin as package metadata describes it; nothing of it has been imported."""

    name: str
    distribution: str
    version: str
    entry_point: importlib.metadata.EntryPoint = field(repr=False, compare=False)

    @property
    def package(self) -> str:
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True)
class Loaded:
    """A plugin that has been imported and has looked for its hardware."""

    plugin: pluggy.PluginManager
    probe: Probe


@dataclass(frozen=True)
class Broken:
    """Why a plugin cannot be asked, in words that follow its name."""

    what: str  # "is installed but does not load: libtpu.so not found."
    cause: Exception | None = None


def candidates(group: str = BACKENDS) -> tuple[Candidate, ...]:
    """Every plugin that an installed distribution offers, by name; reads metadata and imports nothing."""
    found = []
    for entry_point in importlib.metadata.entry_points(group=group):
        distribution = entry_point.dist
        name, version = (distribution.name, distribution.version) if distribution else ("an unnamed package", "?")
        found.append(Candidate(entry_point.name, name, version, entry_point))
    return tuple(sorted(found, key=lambda candidate: (candidate.name, candidate.distribution)))


def load_plugin(candidate: Candidate) -> pluggy.PluginManager:
    """Import one plugin into a manager of its own, so that a misspelt hook is refused and harms no other.

    Raises whatever the import raises, and pluggy's PluginValidationError for a hook we do not know.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(candidate.entry_point.load(), name=candidate.name)
    manager.check_pending()
    return manager


def look(candidate: Candidate) -> Loaded | Broken | InterfaceMismatch:
    """Import one backend and let it look for its hardware; what keeps it from that is returned, not raised."""
    try:
        plugin = load_plugin(candidate)
    except Exception as error:
        return Broken(f"is installed but does not load: {describe_cause(error)}.", error)
    try:
        probe = plugin.hook.windlass_probe()
    except Exception as error:
        return Broken(f"is installed but its probe fails: {describe_cause(error)}.", error)
    if not isinstance(probe, Probe):
        return Broken(f"is installed but its probe gives {type(probe).__name__} where a Probe is wanted.")
    if not is_version(probe.interface_version):
        return Broken(
            f"is installed but its probe says interface_version {probe.interface_version!r} where two numbers are "
            "wanted, such as (1, 0)."
        )
    try:
        check_version(candidate, probe.interface_version)
    except InterfaceMismatch as error:
        return error
    return Loaded(plugin, probe)


def collect_kernels(plugin: pluggy.PluginManager, accelerator: Accelerator) -> list[Kernel]:
    """All kernels that a plugin gives for this accelerator; TypeError if it gives something else."""
    kernels: list[Kernel] = []
    results: list[Iterable[object]] = plugin.hook.windlass_kernels(accelerator=accelerator)
    for result in results:
        for kernel in result:
            if not isinstance(kernel, Kernel):
                raise TypeError(f"windlass_kernels gives {type(kernel).__name__} where a Kernel is wanted")
            kernels.append(kernel)
    return kernels


def check_version(candidate: Candidate, version: tuple[int, int]) -> None:
    """Raise `InterfaceMismatch` unless the major numbers are equal and the minor is none we do not have yet."""
    if version[0] == INTERFACE_VERSION[0] and version[1] <= INTERFACE_VERSION[1]:
        return
    behind = "windlass" if version > INTERFACE_VERSION else candidate.distribution
    raise InterfaceMismatch(
        f"backend {candidate.name!r} of {candidate.package} was written for interface {version[0]}.{version[1]}, but "
        f"this windlass has {INTERFACE_VERSION[0]}.{INTERFACE_VERSION[1]}. Upgrade {behind}."
    )


def is_version(version: object) -> bool:
    """Whether it is a pair of numbers, (major, minor)."""
    return isinstance(version, tuple) and len(version) == 2 and all(type(number) is int for number in version)


def describe_cause(error: BaseException) -> str:
    """The text of an error without its full stop; with its type, unless the text speaks for itself."""
    text = str(error).strip().removesuffix(".")
    if text and isinstance(error, (ImportError, OSError, RuntimeError)):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
