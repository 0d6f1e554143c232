"""Orthogonalisation is chosen by measurement where the configuration leaves it open, once, and the same every time."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from windlass import polar_choice
from windlass.accelerator.interface import Accelerator
from windlass.accelerator.kernels import Kernel
from windlass.accelerator.polar import Form
from windlass.backends.cpu.device import open_cpu
from windlass.config import load_config
from windlass.core.specs import ParamSpec, Role
from windlass.doctor import collect_report, render
from windlass.muon_rules import muon_rules
from windlass.polar_cache import FILE, default_folder
from windlass.polar_choice import PolarChoice, PolarChooser

FORMS = {"polar": "standard", "polar_gram": "gram"}


class Scripted:
    """Kernels that take as long as a test says, on a clock of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator) -> None:
        self.now = 0.0
        self.runs: list[tuple[str, str, tuple[int, ...]]] = []
        self.seconds: dict[tuple[str, str], float] = {}  # (form, dtype) -> of a run
        monkeypatch.setattr(polar_choice, "time", SimpleNamespace(perf_counter=lambda: self.now))
        for name in FORMS:
            accelerator.kernels.register(Kernel(name, "scripted", self._make(FORMS[name]), priority=1000))

    def _make(self, form: str) -> Any:
        def run(stack: Tensor, coefficients: Any, *, product_dtype: torch.dtype) -> Tensor:
            dtype = str(product_dtype).removeprefix("torch.")
            self.runs.append((form, dtype, tuple(stack.shape)))
            self.now += self.seconds[form, dtype]
            return stack

        return run


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    opened = open_cpu()
    opened.capabilities = replace(opened.capabilities, matmul_dtypes=("float32", "bfloat16"))
    yield opened
    opened.close()


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator) -> Scripted:
    made = Scripted(monkeypatch, accelerator)
    made.seconds = {
        ("standard", "bfloat16"): 0.010,
        ("standard", "float32"): 0.020,
        ("gram", "float32"): 0.030,
    }
    return made


def spec(rows: int, columns: int, name: str = "weight") -> ParamSpec:
    return ParamSpec(name, (rows, columns), "float32", Role.MATRIX, "", algorithm="muon")


def choose(accelerator: Accelerator, folder: Path, shapes: Any = ((512, 1024),), **muon: Any) -> PolarChoice:
    config = load_config({"optimizer": {"type": "Muon"}, "muon": muon}, 1)
    specs = [spec(*shape) for shape in shapes]
    return PolarChooser(accelerator, accelerator.collectives.world, folder).choose(config, specs)


def test_the_faster_dtype_is_chosen(accelerator: Accelerator, scripted: Scripted, tmp_path: Path) -> None:
    assert choose(accelerator, tmp_path) == PolarChoice("bfloat16", {})
    scripted.seconds["standard", "float32"] = 0.0095  # not so much faster that it could not be noise
    assert choose(accelerator, tmp_path / "other") == PolarChoice("bfloat16", {})
    scripted.seconds["gram", "float32"] = 0.005  # products in fp32 in whichever form
    found = choose(accelerator, tmp_path / "third")
    assert found.product_dtype == "float32"
    assert found.forms == {"512 x 1024": "gram", "1024 x 512": "gram"}


def test_the_faster_form_is_chosen(accelerator: Accelerator, scripted: Scripted, tmp_path: Path) -> None:
    """The Gram form has fewer operations for these matrices, and is slower here."""
    found = choose(accelerator, tmp_path, [(512, 1024), (1024, 512), (512, 1536)], ns_dtype="fp32")
    wanted: dict[str, Form] = dict.fromkeys(("512 x 1024", "1024 x 512", "512 x 1536", "1536 x 512"), "standard")
    assert found == PolarChoice(None, wanted)
    assert {shape for *_, shape in scripted.runs} == {(1, 512, 1024), (1, 512, 1536)}
    scripted.seconds["gram", "float32"] = 0.021  # within the noise: operations decide
    found = choose(accelerator, tmp_path / "other", [(512, 1024)], ns_dtype="fp32")
    assert set(found.forms.values()) == {"gram"}


@pytest.mark.parametrize(
    ("shapes", "muon"),
    [
        ([(512, 1024)], {"ns_method": "standard"}),
        ([(512, 1024)], {"ns_method": "gram", "ns_dtype": "fp32"}),
        ([(512, 1024)], {"ns_dtype": "bf16"}),  # in which the Gram form is not safe
        ([(64, 1024)], {}),  # takes no time
        ([(512, 16384)], {"ns_dtype": "fp32"}),  # so long that operations are enough to know
    ],
)
def test_what_is_not_open_is_not_measured(
    accelerator: Accelerator, scripted: Scripted, tmp_path: Path, shapes: Any, muon: Any
) -> None:
    assert choose(accelerator, tmp_path, shapes, **muon) == PolarChoice()
    assert not scripted.runs
    assert not list(tmp_path.iterdir())


def test_devices_that_leave_no_choice_are_not_measured(
    accelerator: Accelerator, scripted: Scripted, tmp_path: Path
) -> None:
    accelerator.capabilities = replace(accelerator.capabilities, uniform_program=True)
    assert choose(accelerator, tmp_path) == PolarChoice()
    accelerator.capabilities = replace(accelerator.capabilities, uniform_program=False)
    accelerator.kernels.choose("polar", "reference")
    assert choose(accelerator, tmp_path) == PolarChoice()
    assert not scripted.runs


def test_the_answer_outlives_the_run(accelerator: Accelerator, scripted: Scripted, tmp_path: Path) -> None:
    before = choose(accelerator, tmp_path, ns_dtype="fp32")
    assert choose(accelerator, tmp_path).product_dtype == "bfloat16"
    count = len(scripted.runs)
    scripted.seconds = dict.fromkeys(scripted.seconds, 0.001)  # the machine is another today
    assert choose(accelerator, tmp_path, ns_dtype="fp32") == before
    assert choose(accelerator, tmp_path).product_dtype == "bfloat16"
    assert len(scripted.runs) == count
    assert accelerator.counters.kernels == {}  # measuring is no part of the run


@pytest.mark.parametrize("name", ["torch", "model", "threads"])
def test_another_device_or_version_is_measured_anew(
    accelerator: Accelerator, scripted: Scripted, tmp_path: Path, name: str
) -> None:
    choose(accelerator, tmp_path)
    file = tmp_path / FILE
    (record,) = json.loads(file.read_text())
    record["device"][name] = "another"
    file.write_text(json.dumps([record]))
    count = len(scripted.runs)
    choose(accelerator, tmp_path)
    assert len(scripted.runs) == 2 * count
    assert len(json.loads(file.read_text())) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[1, {}]", "3", '[{"device": {}, "products": {"float32": "fast"}, "forms": {}}]', "\udcff"]
)
def test_a_damaged_cache_counts_as_none(
    accelerator: Accelerator, scripted: Scripted, tmp_path: Path, content: str
) -> None:
    (tmp_path / FILE).write_bytes(content.encode(errors="surrogateescape"))
    assert choose(accelerator, tmp_path).product_dtype == "bfloat16"
    assert len(json.loads((tmp_path / FILE).read_text())) == 1


def test_where_nothing_can_be_written_one_engine_has_one_answer(
    accelerator: Accelerator, scripted: Scripted, tmp_path: Path
) -> None:
    blocked = tmp_path / "a file"
    blocked.write_text("")
    chooser = PolarChooser(accelerator, accelerator.collectives.world, blocked)
    config = load_config({"optimizer": {"type": "Muon"}}, 1)
    first = chooser.choose(config, [spec(512, 1024)])
    scripted.seconds = {key: 1 / value for key, value in scripted.seconds.items()}
    assert chooser.choose(config, [spec(512, 1024)]) == first


def test_what_there_is_no_time_for_is_remembered_too(
    accelerator: Accelerator, scripted: Scripted, tmp_path: Path
) -> None:
    """Else the next run would measure it, and be another."""
    scripted.seconds = dict.fromkeys(scripted.seconds, 0.6)
    shapes = [(512, 1024), (512, 1536)]
    found = choose(accelerator, tmp_path, shapes, ns_dtype="fp32")
    assert scripted.now < 3
    assert {shape for *_, shape in scripted.runs} == {(1, 512, 1024)}
    count = len(scripted.runs)
    assert choose(accelerator, tmp_path, shapes, ns_dtype="fp32") == found
    assert len(scripted.runs) == count


def test_rules_follow_what_was_measured() -> None:
    config = load_config({"optimizer": {"type": "Muon"}}, 1)
    fast = ("float32", "bfloat16")
    assert muon_rules(config, fast).product_dtype == "bfloat16"
    measured = muon_rules(config, fast, PolarChoice("float32", {"512 x 1024": "standard"}))
    assert (measured.product_dtype, measured.direction_dtype) == ("float32", "float32")
    assert measured.measured_forms == {"512 x 1024": "standard"}
    assert (measured.form, muon_rules(config, fast, uniform_program=True).form) == ("auto", "standard")
    gram = load_config({"optimizer": {"type": "Muon"}, "muon": {"ns_method": "gram"}}, 1)
    assert muon_rules(gram, fast).product_dtype == "float32"  # in bf16 the Gram form is not safe


def test_the_doctor_shows_what_was_measured(
    accelerator: Accelerator, scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("WINDLASS_BACKENDS", "cpu")
    choose(accelerator, tmp_path / "windlass", ns_dtype="fp32")
    choose(accelerator, tmp_path / "windlass")
    file = tmp_path / "windlass" / FILE
    file.write_text(file.read_text().replace('"scripted"', '"strips"').replace('"threads": ', '"threads": 4'))
    report = collect_report()
    row = next(row for row in report["backends"] if row["name"] == "cpu")
    assert row["polar"] == json.loads(file.read_text())
    stream = io.StringIO()
    render(report, Console(file=stream, width=400, color_system=None))
    assert "bfloat16 10 ms; float32 20 ms; float32, 5 steps" in stream.getvalue()
    assert "512 x 1024: standard (standard 20 ms, gram 30 ms)" in stream.getvalue()


def test_the_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "windlass"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "windlass"
