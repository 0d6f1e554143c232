"""Installed plugins that exist only in memory: distributions, entry points, modules with hooks, devices."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.accelerator.hookspecs import Probe, hookimpl
from windlass.accelerator.interface import Accelerator, Capabilities, Collectives, Memory, Streams
from windlass.accelerator.kernels import Kernel, Kernels
from windlass.accelerator.reference import SCHEMAS, reference_kernels


def probe(*devices: str, reason: str = "", real: bool = True, version: tuple[int, int] = (1, 0)) -> Probe:
    """A probe that is usable when it names devices."""
    return Probe(bool(devices), reason, devices, real, "runtime 9", version)


class FakeAccelerator(Accelerator):
    """A device with kernels and a name, enough for whoever only chooses and describes devices."""

    def __init__(self, name: str) -> None:
        counters = Counters()
        kernels = Kernels(SCHEMAS, reference_kernels(), counters)
        facets = (cast(Memory, None), Streams(), cast(Collectives, None), kernels)
        facts = {"model": f"model of {name}"}
        super().__init__(name, torch.device("cpu"), *facets, Capabilities(views=True), counters, facts)
        self.closed = False

    def seed(self, seed: int) -> None:
        raise AssertionError("nobody draws from a fake device")

    def rng_state(self) -> Tensor:
        raise AssertionError("nobody draws from a fake device")

    def set_rng_state(self, state: Tensor) -> None:
        raise AssertionError("nobody draws from a fake device")

    def close(self) -> None:
        self.closed = True


class FakeDistribution(importlib.metadata.Distribution):
    """An installed distribution with one entry point."""

    def __init__(self, name: str, version: str, group: str, entry_point: str) -> None:
        self._files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            "entry_points.txt": f"[{group}]\n{entry_point}\n",
        }

    def read_text(self, filename: str) -> str | None:
        return self._files.get(filename)

    def locate_file(self, path: Any) -> Any:
        return path


JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def make_rank(monkeypatch: pytest.MonkeyPatch, rank: int, num_ranks: int) -> None:
    """Pretend to be one rank of a job on one host."""
    values = (str(rank), str(num_ranks), str(rank), str(num_ranks), "127.0.0.1", "29500")
    for name, value in zip(JOB, values, strict=True):
        monkeypatch.setenv(name, value)


def fail(error: Exception) -> Callable[..., Any]:
    """The body of a hook that raises."""

    def function(*arguments: object) -> Any:
        raise error

    return function


def raises_sentence(kind: type[Exception], sentence: str) -> Any:
    """As `pytest.raises`, for an error that says exactly this."""
    return pytest.raises(kind, match=f"^{re.escape(sentence)}$")


class Installed:
    """What is installed while a test runs: only what it installs, with no variable set that steers the choice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._distributions: list[FakeDistribution] = []
        self.opened: list[FakeAccelerator] = []
        for name in ("WINDLASS_ACCELERATOR", "WINDLASS_BACKENDS", *JOB):
            monkeypatch.delenv(name, raising=False)
        self._real_entry_points = importlib.metadata.entry_points
        monkeypatch.setattr(importlib.metadata, "entry_points", self._entry_points)

    def _entry_points(self, *, group: str = "", **others: Any) -> Any:
        if not group.startswith("windlass."):  # frameworks look for plugins of their own while they are imported
            return self._real_entry_points(group=group, **others) if group else self._real_entry_points(**others)
        found = [point for distribution in self._distributions for point in distribution.entry_points]
        return importlib.metadata.EntryPoints(found).select(group=group)

    def distribution(
        self, name: str, module: str, *, package: str, version: str = "1.0", group: str = "windlass.backends"
    ) -> None:
        """Install distribution `package`, whose entry point `name` is `module`."""
        self._distributions.append(FakeDistribution(package, version, group, f"{name} = {module}"))

    def backend(
        self,
        name: str,
        found: Probe | Callable[[], Any],
        *,
        opens: Callable[[str, int], Any] | None = None,
        kernels: Callable[[Accelerator], Iterable[Any]] | None = None,
        package: str = "",
    ) -> None:
        """Install a backend; `found` is its probe or makes it, `opens` by default opens a fake device."""

        def open_fake(name: str, index: int) -> FakeAccelerator:
            self.opened.append(FakeAccelerator(f"{name}:{index}"))
            return self.opened[-1]

        look = (lambda: found) if isinstance(found, Probe) else found
        create = opens or open_fake

        @hookimpl
        def windlass_probe() -> Any:
            return look()

        @hookimpl
        def windlass_open(name: str, index: int) -> Any:
            return create(name, index)

        hooks: dict[str, Any] = {"windlass_probe": windlass_probe, "windlass_open": windlass_open}
        module = self.module(f"fake_{name}", hooks, kernels)
        self.distribution(name, module, package=package or f"windlass-{name}")

    def kernel_package(self, name: str, kernels: Callable[[Accelerator], Iterable[Kernel]]) -> None:
        """Install a package that only adds kernels."""
        module = self.module(f"fake_kernels_{name.replace('-', '_')}", {}, kernels)
        self.distribution(name, module, package=name, group="windlass.kernels")

    def module(
        self, name: str, hooks: dict[str, Any], kernels: Callable[[Accelerator], Iterable[Any]] | None = None
    ) -> str:
        """Make a module importable that has these hooks."""
        module = ModuleType(name)
        for hook, function in hooks.items():
            setattr(module, hook, function)
        if kernels is not None:
            give = kernels

            @hookimpl
            def windlass_kernels(accelerator: Accelerator) -> Iterable[Any]:
                return give(accelerator)

            module.windlass_kernels = windlass_kernels  # type: ignore[attr-defined]
        self._monkeypatch.setitem(sys.modules, name, module)
        return name
