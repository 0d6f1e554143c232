"""What a test of the suite demands: its level, its MUST sentence, and the capabilities that it needs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, TypeVar

from windlass.accelerator.interface import Capabilities

LEVELS: Final = {
    0: "Device, memory, random numbers, errors",
    1: "Kernels against the reference",
    2: "Streams and collectives",
    3: "Training as plain PyTorch does",
    4: "Offloaded training equals resident training",
    5: "Rates",
}
SUITE_RANKS: Final = 4
"""The most ranks that a test of the suite starts."""

Needs = str | tuple[str, ...] | Callable[..., str | tuple[str, ...]] | None
Without = str | Callable[..., str | None] | None

_ATTRIBUTE = "windlass_requirement"
_FLAGS = {field.name for field in fields(Capabilities) if isinstance(field.default, bool)}
_LISTS = {field.name for field in fields(Capabilities)} - _FLAGS
_Test = TypeVar("_Test", bound=Callable[..., Any])


@dataclass(frozen=True)
class Requirement:
    """What `requires` was given. Callables are asked once per set of parameters."""

    level: int
    must: str
    needs: Needs
    without: Without
    since: str

    def resolve(self, parameters: Mapping[str, Any]) -> Resolved:
        """The requirement of one test of a parametrised function; ValueError if it makes no sense."""
        needs = _ask(self.needs, parameters)
        without = _ask(self.without, parameters)
        if without is not None and not isinstance(without, str):
            raise ValueError(f"'without' must name one capability, got {without!r}")
        names = () if needs is None else (needs,) if isinstance(needs, str) else tuple(needs)
        for name in names:
            check_need(name)
        if without is not None:
            check_need(without)
            if without.startswith("ranks:"):
                raise ValueError(f"'without' must name a capability, got {without!r}; ranks are no capability")
        return Resolved(self.level, self.must, tuple(sorted(set(names))), without, self.since)


@dataclass(frozen=True)
class Resolved:
    """What one test demands."""

    level: int
    must: str
    needs: tuple[str, ...]
    without: str | None
    since: str

    @property
    def ranks(self) -> int:
        """How many ranks the test starts; 1 where it does not say."""
        return max((int(name.removeprefix("ranks:")) for name in self.needs if name.startswith("ranks:")), default=1)

    def undeclared(self, capabilities: Capabilities) -> tuple[str, ...]:
        """The capabilities that the test needs and that are not declared; ranks are not among them."""
        return tuple(
            name for name in self.needs if not name.startswith("ranks:") and not is_declared(name, capabilities)
        )


def requires(
    *,
    level: int,
    must: str,
    needs: Needs = None,
    without: Without = None,
    since: str = "1.0",
) -> Callable[[_Test], _Test]:
    """Say what a test of the suite demands. Without `needs` and `without` it is part of the mandatory core.

    `must` is one sentence. `needs` names the capabilities that the test uses: "host_place", "dtypes:bfloat16",
    "matmul_dtypes:float16", or "ranks:2" for two ranks on this machine. `without` names one whose absence is tested.
    Both may be functions of the test's parameters, by name. `since` is the version of the interface that first
    demanded it. Raises ValueError for a level, sentence or version that is none.
    """
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(map(str, LEVELS))}, got {level!r}")
    if must != must.strip() or not must.endswith(".") or "\n" in must:
        raise ValueError(f"must is one sentence that ends in a full stop, got {must!r}")
    if not re.fullmatch(r"\d+\.\d+", since):
        raise ValueError(f"since is a version of the interface, such as '1.0', got {since!r}")
    requirement = Requirement(level, must, needs, without, since)
    if not callable(needs) and not callable(without):
        requirement.resolve({})  # so that a misspelt name is found where it was written

    def decorate(test: _Test) -> _Test:
        setattr(test, _ATTRIBUTE, requirement)
        return test

    return decorate


def requirement_of(test: Callable[..., Any]) -> Requirement | None:
    """What `requires` noted on a test function; None if it was not decorated."""
    found = getattr(test, _ATTRIBUTE, None)
    assert found is None or isinstance(found, Requirement)
    return found


def check_need(name: str) -> None:
    """Raise ValueError unless `name` is a capability, a value of one, or a number of ranks."""
    key, colon, value = name.partition(":")
    if not colon:
        if key in _FLAGS:
            return
        if key in _LISTS:
            raise ValueError(f"capability {key!r} is a list, say which value is needed: '{key}:float32'")
    elif key == "ranks":
        if value in {str(number) for number in range(1, SUITE_RANKS + 1)}:
            return
        raise ValueError(f"the suite starts 1 to {SUITE_RANKS} ranks, got {name!r}")
    elif key in _LISTS:
        if value == "float64":
            raise ValueError(f"{name!r} is never declared, float64 is a capability of its own")
        if value.isidentifier():
            return
    known = ", ".join([*sorted(_FLAGS), *(f"{key}:NAME" for key in sorted(_LISTS)), "ranks:N"])
    raise ValueError(f"there is no capability {name!r}; they are {known}")


def is_declared(name: str, capabilities: Capabilities) -> bool:
    """Whether a capability, or a value of one, is declared. `name` is one that `check_need` accepts, ranks apart."""
    key, colon, value = name.partition(":")
    declared = getattr(capabilities, key)
    return value in declared if colon else bool(declared)


def _ask(wanted: Any, parameters: Mapping[str, Any]) -> Any:
    if not callable(wanted):
        return wanted
    names = inspect.signature(wanted).parameters
    missing = sorted(set(names) - set(parameters))
    if missing:
        raise ValueError(f"the test is not parametrised by {', '.join(missing)}, for which its requirement asks")
    return wanted(**{name: parameters[name] for name in names})
