"""Choose a backend and open it: names first, one import second, hardware last.

A backend is imported when it is asked for, or when nobody chose and it must be probed. A broken one spoils
only itself: asked for, it raises with its cause; only guessed at, its error is kept for `windlass doctor`.
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from typing import Final

import pluggy

from windlass.accelerator.environment import Environment, read_environment
from windlass.accelerator.errors import BackendAmbiguous, BackendNotFound, BackendUnusable, WindlassError
from windlass.accelerator.hookspecs import Probe
from windlass.accelerator.interface import Accelerator
from windlass.accelerator.plugins import (
    KERNELS,
    Broken,
    Candidate,
    Loaded,
    candidates,
    check_version,
    collect_kernels,
    describe_cause,
    is_version,
    load_plugin,
    look,
)

FALLBACK: Final = "cpu"

logger = logging.getLogger("windlass")


@dataclass(frozen=True)
class Choice:
    """Which backend is to be opened, and who said so."""

    backend: str
    index: int | None  # None: the device that belongs to this rank
    why: str
    asked: bool  # somebody named it, so that failing is an error and not a reason to take another
    overruled: tuple[str, ...] = ()  # what the weaker sources said, where they said something else


def open_accelerator(name: str | None = None, *, config_name: str | None = None) -> Accelerator:
    """Open the chosen device, "cpu" or "cuda:1"; without an index, the one that belongs to this rank.

    The first of these decides: `name`, the variable WINDLASS_ACCELERATOR, `config_name`, the only backend
    with a usable real device, the CPU. None, "" and "auto" leave it to the next. What was named raises
    `BackendNotFound`, `BackendUnusable` or `InterfaceMismatch` when it cannot be had; two real devices
    that nobody chose between raise `BackendAmbiguous`; a malformed name raises ValueError.
    """
    registry = Registry(read_environment())
    choice = registry.choose(name, config_name)
    if choice.overruled:
        logger.info("accelerator %r of %s wins over %s", _spell(choice), choice.why, " and ".join(choice.overruled))
    if choice.backend == FALLBACK and registry.environment.local_rank == 0:
        for error in registry.failures.values():  # not choosing a broken device is right, not saying so is not
            logger.warning("%s", error)
    return registry.open(choice)


class Registry:
    """The installed plugins and what came of loading them, for one choice of accelerator."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.candidates = candidates()
        self.failures: dict[str, WindlassError] = {}  # backend -> why it could not be used when guessed at
        self.kernel_failures: dict[Candidate, Exception] = {}  # package of kernels -> why it gave none
        self._loaded: dict[str, Loaded | Broken | WindlassError] = {}  # what came of it, asked for or not

    @property
    def names(self) -> tuple[str, ...]:
        """The backends that may be loaded: installed, and named by WINDLASS_BACKENDS where that is set."""
        allowed = self.environment.backends
        return tuple(sorted({one.name for one in self.candidates if allowed is None or one.name in allowed}))

    def choose(self, name: str | None = None, config_name: str | None = None) -> Choice:
        """Decide by the order that `open_accelerator` gives; probes only when nobody named a backend."""
        sources = (
            ("the argument", name),
            ("WINDLASS_ACCELERATOR", self.environment.accelerator),
            ("the config", config_name),
        )
        asked = [(source, text) for source, text in sources if text and text != "auto"]
        if not asked:
            return self._guess()
        winner, text = asked[0]
        overruled = tuple(f"{other!r} of {source}" for source, other in asked[1:] if other != text)
        backend, index = _parse(text, winner)
        return Choice(backend, index, winner, asked=True, overruled=overruled)

    def probe(self, name: str) -> Probe:
        """Load backend `name` alone and let it look for its hardware; raises whatever keeps it from that."""
        candidate = self._find(name)
        loaded = self._load(candidate)
        if isinstance(loaded, Broken):
            raise BackendUnusable(f"backend {name!r} {loaded.what} {self._advice(candidate)}") from loaded.cause
        if isinstance(loaded, WindlassError):
            raise loaded
        return loaded.probe

    def examine(self, name: str) -> Probe | WindlassError:
        """As `probe`, but a failure is kept in `failures` and returned."""
        if name not in self.failures:
            try:
                return self.probe(name)
            except WindlassError as error:
                self.failures[name] = error
        return self.failures[name]

    def device_index(self, choice: Choice) -> int:
        """The device to open: the one named, else this rank's own, else the only one (as when a launcher
        shows each rank one device). Raises if the backend cannot be used or has no such device."""
        probe = self.probe(choice.backend)
        if not probe.usable:
            raise BackendUnusable(
                f"backend {choice.backend!r} cannot be used here: {probe.reason}. "
                "'windlass doctor' shows which ones can."
            )
        count = len(probe.devices)
        index = choice.index
        if index is None:
            index = self.environment.local_rank if count > 1 else 0
        if index >= count:
            whose = f" for local rank {index}" if choice.index is None else ""
            raise BackendUnusable(
                f"there is no device '{choice.backend}:{index}'{whose}: backend {choice.backend!r} has {count}, "
                f"counted from 0 ({', '.join(probe.devices)}). Name one of these, or start fewer ranks on this host."
            )
        return index

    def open(self, choice: Choice) -> Accelerator:
        """Open the device of a choice and add the kernels that its plugin and other packages give.

        A guessed device that does not open gives way to the CPU with a warning, but only in a job of one
        rank: the ranks of a larger one must not end up on different devices.
        """
        try:
            accelerator = self._open_device(choice)
        except WindlassError as error:
            can_fall_back = choice.backend != FALLBACK and FALLBACK in self.names and self.environment.num_ranks == 1
            if choice.asked or not can_fall_back:
                raise
            self.failures[choice.backend] = error
            logger.warning("falling back to %r: %s", FALLBACK, error)
            choice = Choice(FALLBACK, None, "the guessed device does not open", asked=False)
            accelerator = self._open_device(choice)
        try:
            self._add_kernels(accelerator, choice.backend)
        except BaseException:
            accelerator.close()
            raise
        return accelerator

    def _find(self, name: str) -> Candidate:
        matches = [candidate for candidate in self.candidates if candidate.name == name]
        if not matches:
            installed = sorted({candidate.name for candidate in self.candidates})
            close = difflib.get_close_matches(name.lower(), installed, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise BackendNotFound(
                f"no backend named {name!r} is installed (installed: {', '.join(installed) or 'none'}).{hint}"
            )
        if name not in self.names:
            allowed = ",".join(self.environment.backends or ())
            raise BackendUnusable(
                f"backend {name!r} is kept out by WINDLASS_BACKENDS={allowed}. Add it there to use it."
            )
        if len(matches) > 1:
            packages = " and ".join(candidate.package for candidate in matches)
            raise BackendUnusable(f"backend {name!r} is offered by two packages, {packages}. Uninstall one of them.")
        return matches[0]

    def _guess(self) -> Choice:
        probes = {name: self.examine(name) for name in self.names}
        real = {
            name: probe
            for name, probe in probes.items()
            if isinstance(probe, Probe) and probe.usable and probe.real_device
        }
        if len(real) > 1:
            described = " and ".join(f"{name!r} ({', '.join(probe.devices)})" for name, probe in real.items())
            raise BackendAmbiguous(
                f"more than one backend has a usable device and nobody chose: {described}. Name one in "
                'WINDLASS_ACCELERATOR or under the config key "accelerator".'
            )
        if real:
            return Choice(next(iter(real)), None, "the only usable real device", asked=False)
        if FALLBACK not in self.names:
            reasons = "; ".join(f"{name!r}: {_reason(probe)}" for name, probe in probes.items()) or "none is installed"
            allowed = ",".join(self.environment.backends or ())
            raise BackendNotFound(
                f"no backend has a usable device ({reasons}), and WINDLASS_BACKENDS={allowed} keeps out the fallback. "
                f"Add {FALLBACK!r} there, or name a backend in WINDLASS_ACCELERATOR."
            )
        return Choice(FALLBACK, None, "no real device is usable", asked=False)

    def _open_device(self, choice: Choice) -> Accelerator:
        name = choice.backend
        index = self.device_index(choice)
        try:
            accelerator = self._plugin(name).hook.windlass_open(name=name, index=index)
        except WindlassError:
            raise
        except Exception as error:
            raise BackendUnusable(
                f"backend {name!r} is usable but '{name}:{index}' does not open: {describe_cause(error)}. "
                f"{self._advice(self._find(name))}"
            ) from error
        if not isinstance(accelerator, Accelerator):
            raise BackendUnusable(
                f"backend {name!r} is usable but opening '{name}:{index}' gives {type(accelerator).__name__} where an "
                f"Accelerator is wanted. {self._advice(self._find(name))}"
            )
        try:
            self._check_opened(accelerator, name, index)
        except BaseException:
            accelerator.close()
            raise
        return accelerator

    def _check_opened(self, accelerator: Accelerator, name: str, index: int) -> None:
        """The class may have been written for another version than its plugin's probe says."""
        version = accelerator.interface_version
        if not is_version(version):
            raise BackendUnusable(
                f"backend {name!r} is usable but '{name}:{index}' has interface_version {version!r} where two numbers "
                f"are wanted, such as (1, 0). {self._advice(self._find(name))}"
            )
        check_version(self._find(name), version)

    def _add_kernels(self, accelerator: Accelerator, backend: str) -> None:
        """Register what the backend's plugin gives, then what each package of kernels gives."""
        own = self._find(backend)
        try:
            given = [(own.package, kernel) for kernel in collect_kernels(self._plugin(backend), accelerator)]
        except Exception as error:
            raise BackendUnusable(
                f"backend {backend!r} opens but gives no kernels: {describe_cause(error)}. {self._advice(own)}"
            ) from error
        for candidate in candidates(KERNELS):
            try:
                kernels = collect_kernels(load_plugin(candidate), accelerator)
            except Exception as error:
                if candidate not in self.kernel_failures:
                    logger.warning("%s gives no kernels: %s", candidate.package, describe_cause(error))
                self.kernel_failures[candidate] = error
            else:
                given += [(candidate.package, kernel) for kernel in kernels]
        givers: dict[tuple[str, str], str] = {}
        for package, kernel in given:
            try:
                accelerator.kernels.register(kernel)
            except ValueError as error:
                first = givers.get((kernel.name, kernel.implementation), own.package)
                culprits = package if first == package else f"{package} or {first}"
                raise BackendUnusable(
                    f"{package} gives a kernel that cannot be registered: {error}. Upgrade or uninstall {culprits}."
                ) from error
            givers[kernel.name, kernel.implementation] = package

    def _load(self, candidate: Candidate) -> Loaded | Broken | WindlassError:
        """Import one plugin and let it look for its hardware, once."""
        if candidate.name not in self._loaded:
            self._loaded[candidate.name] = look(candidate)
        return self._loaded[candidate.name]

    def _plugin(self, name: str) -> pluggy.PluginManager:
        loaded = self._loaded[name]
        assert isinstance(loaded, Loaded), "only what was probed is opened"
        return loaded.plugin

    def _advice(self, candidate: Candidate) -> str:
        """What to do about a broken plugin. The others are loaded for it, because naming a broken one helps nobody."""
        others = [name for name in self.names if name != candidate.name and self._is_sound(name)]
        return (
            f"Skip it with WINDLASS_BACKENDS={','.join(others)}." if others else f"Reinstall {candidate.distribution}."
        )

    def _is_sound(self, name: str) -> bool:
        matches = [candidate for candidate in self.candidates if candidate.name == name]
        return len(matches) == 1 and isinstance(self._load(matches[0]), Loaded)


def _parse(text: str, source: str) -> tuple[str, int | None]:
    """Split "cuda:1" as ("cuda", 1), "cuda" as ("cuda", None)."""
    backend, colon, index = text.partition(":")
    if not backend or (colon and not (index.isascii() and index.isdecimal())):
        raise ValueError(f"{source} names accelerator {text!r}, which is not of the form 'cpu' or 'cuda:1'.")
    return backend, int(index) if colon else None


def _spell(choice: Choice) -> str:
    return choice.backend if choice.index is None else f"{choice.backend}:{choice.index}"


def _reason(probe: Probe | WindlassError) -> str:
    return str(probe) if isinstance(probe, WindlassError) else probe.reason or "not a real device"
