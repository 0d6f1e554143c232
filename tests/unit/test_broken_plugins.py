"""A broken plugin spoils only itself: loud when asked for, remembered when only guessed at."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fake_plugins import FakeAccelerator, Installed, fail, make_rank, probe, raises_sentence
from windlass.accelerator.errors import (
    BackendUnusable,
    InterfaceMismatch,
    OutOfMemory,
)
from windlass.accelerator.hookspecs import Probe, hookimpl
from windlass.accelerator.interface import INTERFACE_VERSION
from windlass.accelerator.registry import open_accelerator


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Only a fallback named "cpu" is installed; tests add to it."""
    plugins = Installed(monkeypatch)
    plugins.backend("cpu", probe("a processor", real=False), package="windlass")
    return plugins


def broken_at_import(installed: Installed, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "fake_broken_import.py").write_text("raise ImportError('libtpu.so not found')\n")
    monkeypatch.syspath_prepend(str(folder))
    installed.distribution("xla", "fake_broken_import", package="windlass-xla")


def test_a_plugin_that_raises_at_import(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed.backend("cuda", probe(reason="no driver found"))
    broken_at_import(installed, tmp_path, monkeypatch)
    sentence = (
        "backend 'xla' is installed but does not load: libtpu.so not found. Skip it with WINDLASS_BACKENDS=cpu,cuda."
    )
    with raises_sentence(BackendUnusable, sentence) as caught:
        open_accelerator("xla")
    assert isinstance(caught.value.__cause__, ImportError)

    assert open_accelerator().name == "cpu:0"
    assert caplog.messages == [sentence]


def test_a_plugin_that_raises_at_probe(installed: Installed) -> None:
    cause = KeyError("LD_LIBRARY_PATH")
    installed.backend("xla", fail(cause))
    with raises_sentence(
        BackendUnusable,
        "backend 'xla' is installed but its probe fails: KeyError: 'LD_LIBRARY_PATH'. "
        "Skip it with WINDLASS_BACKENDS=cpu.",
    ) as caught:
        open_accelerator("xla")
    assert caught.value.__cause__ is cause
    assert open_accelerator().name == "cpu:0"


def test_a_plugin_that_raises_at_open(installed: Installed, caplog: pytest.LogCaptureFixture) -> None:
    installed.backend("xla", probe("chip A"), opens=fail(OSError("/dev/accel0 is busy.")))
    sentence = (
        "backend 'xla' is usable but 'xla:0' does not open: /dev/accel0 is busy. Skip it with WINDLASS_BACKENDS=cpu."
    )
    with raises_sentence(BackendUnusable, sentence):
        open_accelerator("xla")
    assert open_accelerator().name == "cpu:0"
    assert caplog.messages[0] == f"falling back to 'cpu': {sentence}"


def test_a_rank_of_a_job_does_not_fall_back_alone(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    installed.backend("xla", probe("chip A"), opens=fail(OSError("/dev/accel0 is busy")))
    make_rank(monkeypatch, 0, 2)
    with raises_sentence(
        BackendUnusable,
        "backend 'xla' is usable but 'xla:0' does not open: /dev/accel0 is busy. Skip it with WINDLASS_BACKENDS=cpu.",
    ):
        open_accelerator()


def test_without_a_fallback_the_cause_is_raised(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    installed.backend("xla", probe("chip A"), opens=fail(OSError("/dev/accel0 is busy")))
    monkeypatch.setenv("WINDLASS_BACKENDS", "xla")
    with raises_sentence(
        BackendUnusable,
        "backend 'xla' is usable but 'xla:0' does not open: /dev/accel0 is busy. Reinstall windlass-xla.",
    ):
        open_accelerator()


def test_an_error_of_ours_at_open_arrives_unchanged(installed: Installed) -> None:
    error = OutOfMemory("xla:0 cannot hold 4.0 GiB")
    installed.backend("xla", probe("chip A"), opens=fail(error))
    with pytest.raises(OutOfMemory) as caught:
        open_accelerator("xla")
    assert caught.value is error


def test_a_plugin_that_says_why_not(installed: Installed) -> None:
    installed.backend("tpu", probe(reason="no chip found"))
    with raises_sentence(
        BackendUnusable,
        "backend 'tpu' cannot be used here: no chip found. 'windlass doctor' shows which ones can.",
    ):
        open_accelerator("tpu")


@pytest.mark.parametrize(
    ("found", "opens", "sentence"),
    [
        (
            lambda: {"usable": True},
            None,
            "backend 'odd' is installed but its probe gives dict where a Probe is wanted. "
            "Skip it with WINDLASS_BACKENDS=cpu.",
        ),
        (
            lambda: Probe(True, "", (), True, "1", (1, 0)),
            None,
            "backend 'odd' is installed but its probe fails: ValueError: a probe is usable exactly when it has "
            "devices, got True with (). Skip it with WINDLASS_BACKENDS=cpu.",
        ),
        (
            lambda: probe("a chip"),
            lambda name, index: None,
            "backend 'odd' is usable but opening 'odd:0' gives NoneType where an Accelerator is wanted. "
            "Skip it with WINDLASS_BACKENDS=cpu.",
        ),
    ],
)
def test_a_plugin_that_gives_the_wrong_thing(installed: Installed, found: Any, opens: Any, sentence: str) -> None:
    installed.backend("odd", found, opens=opens)
    with raises_sentence(BackendUnusable, sentence):
        open_accelerator("odd")


def test_a_misspelt_hook_is_refused(installed: Installed) -> None:
    @hookimpl
    def windlass_prob() -> Probe:
        return probe("a chip")

    installed.distribution("odd", installed.module("fake_odd", {"windlass_prob": windlass_prob}), package="odd")
    with raises_sentence(
        BackendUnusable,
        "backend 'odd' is installed but does not load: PluginValidationError: unknown hook 'windlass_prob' in plugin "
        f"{sys.modules['fake_odd']!r}. Skip it with WINDLASS_BACKENDS=cpu.",
    ):
        open_accelerator("odd")


@pytest.mark.parametrize("asked", ["xla", None])
def test_the_advice_names_no_other_broken_backend(
    installed: Installed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    asked: str | None,
) -> None:
    """Neither when one was asked for, which loads no other until it fails, nor when all were looked at."""
    broken_at_import(installed, tmp_path, monkeypatch)
    installed.backend("driverless", probe(reason="no driver found"))
    installed.backend("old", probe("chip A", version=(0, 9)))
    installed.backend("raises", fail(OSError("no such file")))
    installed.backend("twice", probe("chip B"), package="one")
    installed.backend("twice", probe("chip B"), package="two")
    sentence = (
        "backend 'xla' is installed but does not load: libtpu.so not found. "
        "Skip it with WINDLASS_BACKENDS=cpu,driverless."
    )
    if asked:
        with raises_sentence(BackendUnusable, sentence):
            open_accelerator(asked)
    else:
        assert open_accelerator().name == "cpu:0"
        assert sentence in caplog.messages
        advised = [text for text in caplog.messages if "WINDLASS_BACKENDS" in text]
        assert [text.partition("Skip it with ")[2] for text in advised] == ["WINDLASS_BACKENDS=cpu,driverless."] * 2
    monkeypatch.setenv("WINDLASS_BACKENDS", "cpu,driverless")
    caplog.clear()
    assert open_accelerator().name == "cpu:0"
    assert caplog.messages == []


def test_a_backend_that_is_kept_out_is_not_loaded_for_the_advice(
    installed: Installed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_at_import(installed, tmp_path, monkeypatch)
    installed.backend("tpu", fail(AssertionError("probed although it is kept out")))
    monkeypatch.setenv("WINDLASS_BACKENDS", "xla")
    with raises_sentence(
        BackendUnusable,
        "backend 'xla' is installed but does not load: libtpu.so not found. Reinstall windlass-xla.",
    ):
        open_accelerator("xla")


@pytest.mark.parametrize(("version", "behind"), [((2, 0), "windlass"), ((1, 7), "windlass"), ((0, 9), "windlass-xla")])
def test_another_interface_version(installed: Installed, version: tuple[int, int], behind: str) -> None:
    installed.backend("xla", probe("chip A", version=version))
    with raises_sentence(
        InterfaceMismatch,
        f"backend 'xla' of windlass-xla 1.0 was written for interface {version[0]}.{version[1]}, but this windlass has "
        f"{INTERFACE_VERSION[0]}.{INTERFACE_VERSION[1]}. Upgrade {behind}.",
    ):
        open_accelerator("xla")
    assert open_accelerator().name == "cpu:0"


def open_versioned(installed: Installed, version: Any) -> list[FakeAccelerator]:
    """Install "xla", whose probe says 1.0 and whose accelerator says `version`; what it opens is in the list."""
    opened: list[FakeAccelerator] = []

    def open_device(name: str, index: int) -> FakeAccelerator:
        accelerator = FakeAccelerator(f"{name}:{index}")
        accelerator.interface_version = version
        opened.append(accelerator)
        return accelerator

    installed.backend("xla", probe("chip A"), opens=open_device)
    return opened


@pytest.mark.parametrize(("version", "behind"), [((2, 0), "windlass"), ((1, 7), "windlass"), ((0, 9), "windlass-xla")])
def test_an_accelerator_of_another_interface_version(
    installed: Installed, caplog: pytest.LogCaptureFixture, version: tuple[int, int], behind: str
) -> None:
    opened = open_versioned(installed, version)
    sentence = (
        f"backend 'xla' of windlass-xla 1.0 was written for interface {version[0]}.{version[1]}, but this windlass has "
        f"{INTERFACE_VERSION[0]}.{INTERFACE_VERSION[1]}. Upgrade {behind}."
    )
    with raises_sentence(InterfaceMismatch, sentence):
        open_accelerator("xla")
    assert open_accelerator().name == "cpu:0"
    assert caplog.messages[0] == f"falling back to 'cpu': {sentence}"
    assert [accelerator.closed for accelerator in opened] == [True, True]


@pytest.mark.parametrize("version", ["1.0", (1,), 1.0, (1, 0, 0), (1, "0"), None])
def test_an_interface_version_that_is_none(installed: Installed, version: Any) -> None:
    opened = open_versioned(installed, version)
    with raises_sentence(
        BackendUnusable,
        f"backend 'xla' is usable but 'xla:0' has interface_version {version!r} where two numbers are wanted, such as "
        "(1, 0). Skip it with WINDLASS_BACKENDS=cpu.",
    ):
        open_accelerator("xla")
    assert opened[0].closed
    installed.backend("odd", probe("chip A", version=version))
    with raises_sentence(
        BackendUnusable,
        f"backend 'odd' is installed but its probe says interface_version {version!r} where two numbers are wanted, "
        "such as (1, 0). Skip it with WINDLASS_BACKENDS=cpu,xla.",
    ):
        open_accelerator("odd")
