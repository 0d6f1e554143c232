"""The doctor shows every installed backend, broken ones with their reason, and never raises for one."""

from __future__ import annotations

import io
import json
import platform
from typing import Any

import pytest
from rich.console import Console

from fake_plugins import FakeAccelerator, Installed, fail, make_rank, probe
from windlass.accelerator.reference import SCHEMAS
from windlass.accelerator.registry import open_accelerator
from windlass.doctor import collect_report, render


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Only a fallback named "cpu" is installed; tests add to it."""
    plugins = Installed(monkeypatch)
    plugins.backend("cpu", probe("a processor", real=False), package="windlass")
    return plugins


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["backends"]}


def show(report: dict[str, Any], width: int = 100) -> str:
    """The rendered report as plain text."""
    stream = io.StringIO()
    render(report, Console(file=stream, width=width, color_system=None))
    return stream.getvalue()


refuse = fail(OSError("/dev/accel0 is [bold]busy[/bold]"))


def test_a_usable_backend_is_described(installed: Installed) -> None:
    installed.backend("gpu", probe("card A", "card B"))
    report = collect_report()
    row = rows(report)["gpu"]
    assert (row["distribution"], row["version"], row["usable"], row["reason"]) == ("windlass-gpu", "1.0", True, "")
    assert row["devices"] == ["card A", "card B"]
    assert row["runtime"] == "runtime 9"
    assert row["capabilities"]["views"] is True
    assert row["kernels"] == {schema.name: "reference" for schema in SCHEMAS}
    assert row["facts"] == {"model": "model of gpu:0"}
    assert report["choice"] == {"accelerator": "gpu:0", "why": "the only usable real device"}
    assert report["python"] == platform.python_version()


def test_what_is_opened_is_closed(installed: Installed) -> None:
    collect_report()
    assert [accelerator.closed for accelerator in installed.opened] == [True]


def test_the_report_is_plain_data(installed: Installed) -> None:
    def open_with_odd_facts(name: str, index: int) -> FakeAccelerator:
        accelerator = FakeAccelerator(f"{name}:{index}")
        accelerator.facts = {"path": platform, "sizes": (1, 2)}
        return accelerator

    installed.backend("gpu", probe("card A"), opens=open_with_odd_facts)
    report = collect_report()
    assert json.loads(json.dumps(report)) == report
    assert rows(report)["gpu"]["facts"]["sizes"] == [1, 2]


def test_broken_backends_become_rows(installed: Installed) -> None:
    installed.backend("busy", probe("chip A"), opens=refuse)
    installed.backend("lost", refuse)
    installed.backend("old", probe("chip B", version=(0, 9)))
    installed.backend("none", probe(reason="no chip found"))
    installed.backend("twice", probe("chip C"), package="one")
    installed.backend("twice", probe("chip C"), package="two")
    installed.distribution("ghost", "no_such_module_anywhere", package="ghost")
    report = collect_report()
    reasons = {row["name"]: row["reason"] for row in report["backends"] if not row["usable"]}
    assert reasons["busy"].startswith("backend 'busy' is usable but 'busy:0' does not open: /dev/accel0 is [bold]busy")
    assert reasons["lost"].startswith("backend 'lost' is installed but its probe fails: /dev/accel0")
    assert reasons["old"].endswith("was written for interface 0.9, but this windlass has 1.1. Upgrade windlass-old.")
    assert reasons["none"] == "no chip found"
    assert reasons["twice"].startswith("backend 'twice' is offered by two packages, one 1.0 and two 1.0.")
    assert reasons["ghost"] == (
        "backend 'ghost' is installed but does not load: No module named 'no_such_module_anywhere'. "
        "Skip it with WINDLASS_BACKENDS=busy,cpu,none."
    )
    assert [row["name"] for row in report["backends"]].count("twice") == 2
    assert rows(report)["cpu"]["usable"] is True
    # "busy" is the only real device that probes well, so opening it is tried before the fallback.
    assert report["choice"] == {
        "accelerator": "cpu:0",
        "why": "'busy' is the only usable real device but does not open",
    }
    assert open_accelerator().name == report["choice"]["accelerator"]


@pytest.mark.parametrize(
    ("variable", "choice"),
    [
        ("gpu", {"accelerator": "gpu:0", "why": "chosen by WINDLASS_ACCELERATOR"}),
        ("gpu:1", {"accelerator": "gpu:1", "why": "chosen by WINDLASS_ACCELERATOR"}),
        (
            "gup",
            {
                "accelerator": None,
                "why": "no backend named 'gup' is installed (installed: busy, cpu, gpu). Did you mean 'gpu'?",
            },
        ),
        (
            "busy",
            {
                "accelerator": None,
                "why": "backend 'busy' is usable but 'busy:0' does not open: /dev/accel0 is [bold]busy[/bold]. "
                "Skip it with WINDLASS_BACKENDS=cpu,gpu.",
            },
        ),
        (
            "gpu:",
            {
                "accelerator": None,
                "why": "WINDLASS_ACCELERATOR names accelerator 'gpu:', which is not of the form 'cpu' or 'cuda:1'.",
            },
        ),
    ],
)
def test_the_choice_follows_the_variable(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, variable: str, choice: dict[str, str | None]
) -> None:
    installed.backend("gpu", probe("card A", "card B"))
    installed.backend("busy", probe("chip A"), opens=refuse)
    monkeypatch.setenv("WINDLASS_ACCELERATOR", variable)
    report = collect_report()
    assert report["choice"] == choice
    assert report["variables"] == {"WINDLASS_ACCELERATOR": variable}


def test_a_tie_is_reported(installed: Installed) -> None:
    installed.backend("gpu", probe("card A"))
    installed.backend("tpu", probe("chip A"))
    choice = collect_report()["choice"]
    assert choice["accelerator"] is None
    assert choice["why"].startswith(
        "more than one backend has a usable device and nobody chose: 'gpu' (card A) and 'tpu'"
    )


def test_a_variable_that_cannot_be_read(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    report = collect_report()
    assert report["choice"]["accelerator"] is None
    assert "RANK" in report["choice"]["why"]
    assert rows(report)["cpu"]["usable"] is False
    assert "RANK" in show(report)


def test_a_rank_of_a_job_opens_nothing(installed: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    make_rank(monkeypatch, 1, 2)
    installed.backend("gpu", probe("card A", "card B"))
    report = collect_report()
    assert rows(report)["gpu"]["reason"] == "not opened by one of 2 ranks"
    assert report["choice"]["accelerator"] == "gpu:1"
    assert installed.opened == []


def test_packages_of_kernels_are_listed(installed: Installed) -> None:
    installed.kernel_package("broken-kernels", refuse)
    installed.kernel_package("good-kernels", lambda accelerator: [])
    report = collect_report()
    assert {row["name"]: row["reason"] for row in report["kernel_packages"]} == {
        "broken-kernels": "/dev/accel0 is [bold]busy[/bold]",
        "good-kernels": "",
    }
    text = show(report)
    assert "kernels of broken-kernels 1.0: /dev/accel0 is [bold]busy[/bold]" in text
    assert "kernels of good-kernels 1.0: loaded" in text


@pytest.mark.parametrize("width", [60, 100, 200])
def test_a_person_reads_what_there_is(installed: Installed, width: int) -> None:
    installed.backend("gpu", probe("card A", "card B"))
    installed.backend("tpu", probe(reason="no chip found"))
    lines = show(collect_report(), width).splitlines()
    table = [line.split() for line in lines]
    assert ["cpu", "windlass", "1.0", "yes", "cpu:0", "a", "processor"] in table
    assert ["tpu", "windlass-tpu", "1.0", "no", "no", "chip", "found"] in table
    assert "gpu:1  card B" in "\n".join(lines)
    assert lines[-1] == "gpu:0 would be used: the only usable real device."


def test_markup_in_a_reason_is_shown_as_it_is(installed: Installed) -> None:
    installed.backend("busy", refuse)
    assert "[bold]busy[/bold]" in show(collect_report(), width=300)
