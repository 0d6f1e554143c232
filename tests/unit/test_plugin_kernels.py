"""Backends and packages of kernels give implementations when an accelerator is opened."""

from __future__ import annotations

from typing import Any

import pytest

from fake_plugins import Installed, fail, probe, raises_sentence
from windlass.accelerator.errors import (
    BackendUnusable,
)
from windlass.accelerator.interface import Accelerator
from windlass.accelerator.kernels import Kernel
from windlass.accelerator.registry import open_accelerator


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Only a fallback named "cpu" is installed; tests add to it."""
    plugins = Installed(monkeypatch)
    plugins.backend("cpu", probe("a processor", real=False), package="windlass")
    return plugins


def give(implementation: str, priority: int = 100, name: str = "square_sum") -> Any:
    """A hook body that gives one kernel."""
    return lambda accelerator: [Kernel(name, implementation, lambda *arguments: None, priority)]


def test_kernels_of_the_backend_and_of_packages_are_registered(installed: Installed) -> None:
    installed.backend("gpu", probe("card A"), kernels=give("of-the-backend"))
    installed.kernel_package("fast-kernels", give("of-a-package", priority=300))
    accelerator = open_accelerator("gpu")
    offered = {kernel.implementation for kernel in accelerator.kernels.implementations("square_sum")}
    assert offered == {"reference", "of-the-backend", "of-a-package"}
    assert accelerator.kernels.chosen()["square_sum"] == "of-a-package"


def test_a_kernel_package_sees_the_accelerator_it_may_serve(installed: Installed) -> None:
    seen: list[str] = []

    def give_nothing(accelerator: Accelerator) -> list[Kernel]:
        seen.append(accelerator.name)
        return []

    installed.kernel_package("picky", give_nothing)
    open_accelerator("cpu")
    assert seen == ["cpu:0"]


def test_the_same_kernel_given_twice(installed: Installed) -> None:
    installed.kernel_package("fast-a", give("fast"))
    installed.kernel_package("fast-b", give("fast"))
    with raises_sentence(
        BackendUnusable,
        "fast-b 1.0 gives a kernel that cannot be registered: kernel 'square_sum' already has an implementation named "
        "'fast'. Upgrade or uninstall fast-b 1.0 or fast-a 1.0.",
    ):
        open_accelerator("cpu")
    assert [accelerator.closed for accelerator in installed.opened] == [True]


def test_a_kernel_without_a_schema(installed: Installed) -> None:
    installed.kernel_package("odd", give("fast", name="warp"))
    with pytest.raises(BackendUnusable, match=r"^odd 1.0 gives a kernel that cannot be registered: no kernel schema"):
        open_accelerator("cpu")


def test_a_broken_kernel_package_spoils_only_itself(installed: Installed, caplog: pytest.LogCaptureFixture) -> None:
    installed.kernel_package("broken", fail(ImportError("no compiler")))
    installed.kernel_package("good", give("good"))
    accelerator = open_accelerator("cpu")
    assert accelerator.kernels.chosen()["square_sum"] == "good"
    assert caplog.messages == ["broken 1.0 gives no kernels: no compiler"]


def test_a_backend_whose_kernels_fail_is_closed_and_raises(installed: Installed) -> None:
    installed.backend("gpu", probe("card A"), kernels=lambda accelerator: ["adamw"])
    with raises_sentence(
        BackendUnusable,
        "backend 'gpu' opens but gives no kernels: TypeError: windlass_kernels gives str where a Kernel is wanted. "
        "Skip it with WINDLASS_BACKENDS=cpu.",
    ):
        open_accelerator("gpu")
    assert [accelerator.closed for accelerator in installed.opened] == [True]
