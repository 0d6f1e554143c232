"""Deliberately broken variants of the backends: what each breaks, and which tests have to notice.

A mutation replaces one function or method of a backend in a process, so that the backend opens and works as before save
for one thing. `mutant_backend` and `mutant_plugin` apply it, `mutant_runs` runs the tests on it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from windlass.accelerator.interface import Work

Base = Literal["cpu", "sim"]
_FILES: Final = (
    "mutations_memory",
    "mutations_kernels",
    "mutations_optimizers",
    "mutations_collectives",
    "mutations_sim",
)


@dataclass(frozen=True)
class Mutation:
    """One way to break a backend."""

    name: str
    base: Base
    breaks: str  # a clause: "the peak is never reset"
    where: tuple[str, ...]
    """Tests that are run on it: ids of the conformance suite, "test_l0_memory.py::test_empty", or paths under tests/,
    which are run without the suite. An id without parameters, or a file, stands for all tests in it."""
    apply: Callable[[], None]

    @property
    def is_seen_by_suite(self) -> bool:
        return not self.where[0].startswith("tests/")


_known: dict[str, Mutation] = {}


def mutation(base: Base, owner: Any, attribute: str, breaks: str, *where: str) -> Callable[[Callable[..., Any]], None]:
    """Name a mutation after the decorated function, which stands in for `owner.attribute` and gets the original as its
    first argument. `owner` is a class, or the module in whose namespace a function is looked up."""

    def decorate(function: Callable[..., Any]) -> None:
        def apply() -> None:
            original = getattr(owner, attribute)

            @functools.wraps(original)
            def mutated(*args: Any, **kwargs: Any) -> Any:
                return function(original, *args, **kwargs)

            setattr(owner, attribute, mutated)

        name = function.__name__.replace("_", "-")
        assert name not in _known, f"two mutations are named {name}"
        _known[name] = Mutation(name, base, breaks, where, apply)

    return decorate


@functools.cache
def mutations() -> dict[str, Mutation]:
    """All of them by name, in the order in which they are written."""
    for file in _FILES:
        importlib.import_module(file)
    return dict(_known)


@functools.cache
def apply_once(name: str) -> None:
    """Break this process for good."""
    mutations()[name].apply()


class Afterwards(Work):
    """Another work, whose result is spoilt by an action when it is first waited for."""

    def __init__(self, work: Work, action: Callable[[], object]) -> None:
        self._work = work
        self._action: Callable[[], object] | None = action

    def wait(self) -> None:
        self._work.wait()
        if self._action is not None:
            self._action()
            self._action = None

    def done(self) -> bool:
        return self._work.done()
