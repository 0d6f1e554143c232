"""Backends are found by name, chosen in a fixed order, and a broken one spoils only itself."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from fake_plugins import Installed, fail, make_rank, probe, raises_sentence
from windlass.accelerator.errors import (
    BackendAmbiguous,
    BackendNotFound,
    BackendUnusable,
)
from windlass.accelerator.plugins import candidates
from windlass.accelerator.registry import open_accelerator


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Only a fallback named "cpu" is installed; tests add to it."""
    plugins = Installed(monkeypatch)
    plugins.backend("cpu", probe("a processor", real=False), package="windlass")
    return plugins


# Names: metadata only.


def test_the_built_in_backend_is_found_through_its_entry_point() -> None:
    assert "cpu" in [candidate.name for candidate in candidates()]


def test_listing_imports_no_plugin(installed: Installed) -> None:
    installed.distribution("ghost", "no_such_module_anywhere", package="ghost")
    assert [candidate.package for candidate in candidates() if candidate.name == "ghost"] == ["ghost 1.0"]


def test_importing_the_registry_and_the_built_in_hooks_imports_no_framework() -> None:
    code = (
        "import sys, windlass.accelerator.registry, windlass.backends.cpu;"
        "print(*sorted({'torch', 'numba', 'numpy', 'jax', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# The order of choice.


def test_a_fallback_is_opened_when_nothing_real_is_usable(installed: Installed) -> None:
    installed.backend("tpu", probe(reason="no chip found"))
    assert open_accelerator().name == "cpu:0"


def test_the_single_real_device_is_preferred_to_the_fallback(installed: Installed) -> None:
    installed.backend("tpu", probe("chip A"))
    installed.backend("simulated", probe("a simulation", real=False))
    assert open_accelerator().name == "tpu:0"


@pytest.mark.parametrize(
    ("argument", "variable", "config", "opened"),
    [
        ("cpu", "tpu", "gpu", "cpu:0"),
        (None, "tpu", "gpu", "tpu:0"),
        (None, None, "gpu", "gpu:0"),
        ("auto", "auto", "gpu:1", "gpu:1"),
    ],
)
def test_argument_before_variable_before_config(
    installed: Installed,
    monkeypatch: pytest.MonkeyPatch,
    argument: str | None,
    variable: str | None,
    config: str,
    opened: str,
) -> None:
    installed.backend("tpu", probe("chip A"))
    installed.backend("gpu", probe("card A", "card B"))
    if variable:
        monkeypatch.setenv("WINDLASS_ACCELERATOR", variable)
    assert open_accelerator(argument, config_name=config).name == opened


def test_one_line_says_who_won(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WINDLASS_ACCELERATOR", "tpu")
    with caplog.at_level(logging.INFO, "windlass"):
        open_accelerator("cpu", config_name="gpu:1")
    assert caplog.messages == [
        "accelerator 'cpu' of the argument wins over 'tpu' of WINDLASS_ACCELERATOR and 'gpu:1' of the config"
    ]


def test_agreement_is_silent(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WINDLASS_ACCELERATOR", "cpu")
    with caplog.at_level(logging.INFO, "windlass"):
        open_accelerator("cpu", config_name="cpu")
    assert caplog.messages == []


def test_naming_a_backend_loads_no_other(installed: Installed) -> None:
    installed.backend("tpu", fail(AssertionError("probed although nobody asked")))
    assert open_accelerator("cpu").name == "cpu:0"


def test_two_real_devices_and_no_choice(installed: Installed) -> None:
    installed.backend("tpu", probe("chip A"))
    installed.backend("gpu", probe("card A", "card B"))
    with raises_sentence(
        BackendAmbiguous,
        "more than one backend has a usable device and nobody chose: 'gpu' (card A, card B) and 'tpu' (chip A). Name "
        'one in WINDLASS_ACCELERATOR or under the config key "accelerator".',
    ):
        open_accelerator()


@pytest.mark.parametrize("name", ["cpu:", "cpu:one", ":1", "cpu:-1", "cpu:0:1", "cpu:²"])
def test_a_malformed_name(installed: Installed, name: str) -> None:
    with raises_sentence(
        ValueError, f"the argument names accelerator {name!r}, which is not of the form 'cpu' or 'cuda:1'."
    ):
        open_accelerator(name)


# Indices.


def test_a_rank_opens_the_device_of_its_own(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    installed.backend("gpu", probe("card A", "card B"))
    make_rank(monkeypatch, 1, 2)
    assert open_accelerator("gpu").name == "gpu:1"
    assert open_accelerator("gpu:0").name == "gpu:0"
    assert open_accelerator("cpu").name == "cpu:0"


def test_an_unknown_device_index(installed: Installed) -> None:
    installed.backend("gpu", probe("card A", "card B"))
    with raises_sentence(
        BackendUnusable,
        "there is no device 'gpu:2': backend 'gpu' has 2, counted from 0 (card A, card B). Name one of these, or start "
        "fewer ranks on this host.",
    ):
        open_accelerator("gpu:2")


def test_more_ranks_than_devices(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    installed.backend("gpu", probe("card A", "card B"))
    make_rank(monkeypatch, 2, 3)
    with raises_sentence(
        BackendUnusable,
        "there is no device 'gpu:2' for local rank 2: backend 'gpu' has 2, counted from 0 (card A, card B). Name one "
        "of these, or start fewer ranks on this host.",
    ):
        open_accelerator()


# Names that are missing, doubled, or kept out.


@pytest.mark.parametrize(
    ("name", "hint"), [("cudaa", " Did you mean 'cuda'?"), ("CPU:0", " Did you mean 'cpu'?"), ("hpu42x", "")]
)
def test_a_name_that_is_not_installed(installed: Installed, name: str, hint: str) -> None:
    installed.backend("cuda", probe("card A"))
    wanted = name.partition(":")[0]
    with raises_sentence(BackendNotFound, f"no backend named {wanted!r} is installed (installed: cpu, cuda).{hint}"):
        open_accelerator(name)


def test_a_name_taken_by_two_packages(installed: Installed) -> None:
    installed.backend("xla", probe("chip A"), package="windlass-xla")
    installed.backend("xla", probe("chip A"), package="other-xla")
    with raises_sentence(
        BackendUnusable,
        "backend 'xla' is offered by two packages, other-xla 1.0 and windlass-xla 1.0. Uninstall one of them.",
    ):
        open_accelerator("xla")
    assert open_accelerator().name == "cpu:0"


def test_a_backend_that_is_kept_out_is_not_loaded(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    installed.backend("tpu", fail(AssertionError("probed although it is kept out")))
    installed.backend("gpu", probe("card A"))
    monkeypatch.setenv("WINDLASS_BACKENDS", "cpu,gpu")
    assert open_accelerator().name == "gpu:0"
    with raises_sentence(
        BackendUnusable, "backend 'tpu' is kept out by WINDLASS_BACKENDS=cpu,gpu. Add it there to use it."
    ):
        open_accelerator("tpu")


def test_no_usable_device_and_no_fallback(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    installed.backend("gpu", probe(reason="no driver found"))
    monkeypatch.setenv("WINDLASS_BACKENDS", "gpu")
    with raises_sentence(
        BackendNotFound,
        "no backend has a usable device ('gpu': no driver found), and WINDLASS_BACKENDS=gpu keeps out the fallback. "
        "Add 'cpu' there, or name a backend in WINDLASS_ACCELERATOR.",
    ):
        open_accelerator()
