"""What a test of the conformance suite may demand, and what a measurement and a report hold."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fake_plugins import raises_sentence
from toy_backend import ToyAccelerator
from windlass.accelerator.hookspecs import Probe
from windlass.accelerator.interface import Capabilities
from windlass.accelerator.registry import Choice
from windlass.conformance.device import DeviceUnderTest
from windlass.conformance.measurements import Measurements
from windlass.conformance.requirements import Resolved, requirement_of, requires
from windlass.conformance.results import TestResult, level_results, make_report


def demand_of(*, parameters: dict[str, Any] | None = None, **options: Any) -> Resolved:
    @requires(level=0, must="It holds.", **options)
    def test() -> None: ...

    requirement = requirement_of(test)
    assert requirement is not None
    return requirement.resolve(parameters or {})


def test_needs_are_one_name_several_or_a_function_of_the_parameters() -> None:
    assert demand_of().needs == ()
    assert demand_of(needs="views").needs == ("views",)
    assert demand_of(needs=("views", "dtypes:float16", "views")).needs == ("dtypes:float16", "views")
    both = demand_of(
        needs=lambda dtype, n: (f"dtypes:{dtype}", f"ranks:{n}"), parameters={"dtype": "a", "n": 2, "x": 0}
    )
    assert (both.needs, both.ranks) == (("dtypes:a", "ranks:2"), 2)
    assert demand_of(needs=lambda n: ("float64",) if n else (), parameters={"n": 0}).needs == ()
    assert demand_of(without=lambda d: f"dtypes:{d}", parameters={"d": "float16"}).without == "dtypes:float16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"needs": "vews"}, "there is no capability 'vews'; they are .*views.*dtypes:NAME.*ranks:N"),
        ({"needs": "dtypes"}, "capability 'dtypes' is a list, say which value is needed: 'dtypes:float32'"),
        ({"needs": "dtypes:float64"}, "'dtypes:float64' is never declared, float64 is a capability of its own"),
        ({"needs": "ranks:5"}, "the suite starts 1 to 4 ranks, got 'ranks:5'"),
        ({"needs": "views:yes"}, "there is no capability 'views:yes'"),
        ({"without": "ranks:2"}, "'without' must name a capability"),
        ({"level": 6}, "level must be one of 0, 1, 2, 3, 4, 5, got 6"),
        ({"must": "It holds"}, "must is one sentence that ends in a full stop"),
        ({"since": "1"}, "since is a version of the interface"),
    ],
)
def test_a_requirement_that_makes_no_sense_is_refused_where_it_is_written(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        requires(**{"level": 0, "must": "It holds.", **options})


def test_undeclared_capabilities_are_those_that_are_needed_and_not_declared() -> None:
    demand = demand_of(needs=("ranks:2", "views", "lazy", "dtypes:float16", "matmul_dtypes:float32"))
    assert demand.undeclared(Capabilities(views=True)) == ("dtypes:float16", "lazy")
    assert demand.undeclared(Capabilities(views=True, lazy=True, dtypes=("float16",))) == ()


@pytest.mark.parametrize(
    ("index", "devices", "ranks", "name"),
    [(None, 1, 1, "toy:0"), (1, 2, 1, "toy:1"), (None, 4, 4, "toy"), (1, 4, 2, "toy"), (None, 1, 4, "toy:0"),
     (1, 2, 3, "toy:1")],
)  # fmt: skip
def test_ranks_take_a_device_each_where_there_are_enough(
    index: int | None, devices: int, ranks: int, name: str
) -> None:
    probe = Probe(True, "", tuple("abcd"[:devices]), False, "9", (1, 0))
    device = DeviceUnderTest(ToyAccelerator("toy:0"), Choice("toy", index, "a test", asked=True), probe, "toy 1.0")
    assert device.name_for(ranks) == name
    assert device.most_ranks == devices


def test_measurements_become_cases_of_their_kernel_and_rates() -> None:
    measurements = Measurements()
    kernel = {"name": "scale", "error": 0.3, "bound": 1.0, "unit": "of the allowed error"}
    measurements.note("kernel", implementation="fast", dtype="bfloat16", case="tiny inputs", **kernel)
    measurements.note("kernel", implementation="reference", **(kernel | {"error": math.inf}))
    measurements.note("rate", name="copy up", value=5e9, unit="B/s")
    assert measurements.rates() == [{"name": "copy up", "value": 5e9, "unit": "B/s"}]
    case = {"error": 0.3, "bound": 1.0, "unit": "of the allowed error"}
    assert measurements.kernels(ToyAccelerator("toy:0").kernels) == [
        {
            "name": "scale",
            "chosen": "fast",
            "implementations": ["fast", "reference"],
            "tolerance": "one unit in the last place",
            "rounding": "nowhere",
            "cases": [
                {"implementation": "fast", "case": "bfloat16 tiny inputs", **case},
                {"implementation": "reference", "case": "", **case, "error": None},
            ],
        }
    ]


def test_a_measurement_that_the_report_cannot_show_is_refused() -> None:
    measurements = Measurements()
    with raises_sentence(ValueError, "a measurement is one of kernel, rate, got 'speed'"):
        measurements.note("speed")
    with raises_sentence(ValueError, "a measurement of kind 'rate' needs value, unit"):
        measurements.note("rate", name="copy up")
    with pytest.raises(TypeError, match="not JSON serializable"):
        measurements.note("rate", name="copy up", value=object(), unit="B/s")


def test_the_report_has_schema_1() -> None:
    demand = demand_of(needs="float64")
    report = make_report(
        [TestResult("test_l0_a.py::test_a", demand, "under-declared", 0.25, "works without being declared: float64")],
        about={"suite": "0.1.0"},
        asked=0,
        selection=None,
        problems=[],
        undeclared={"test_l0_a.py::test_a": ["float64"]},
        kernels=[],
        rates=[],
        foreign_warnings=["UserWarning: careful (vendor/core.py)"],
        expected_failures=[],
    )
    assert {**report, "levels": report["levels"][:2]} == {
        "schema": 1,
        "suite": "0.1.0",
        "level": None,
        "asked": 0,
        "selection": None,
        "problems": [],
        "levels": [
            {"level": 0, "title": "Device, memory, random numbers, errors", "state": "failed",
             "counts": {"under-declared": 1}},
            {"level": 1, "title": "Kernels against the reference", "state": "no tests yet", "counts": {}},
        ],
        "tests": [
            {"id": "test_l0_a.py::test_a", "level": 0, "must": "It holds.", "since": "1.0", "needs": ["float64"],
             "without": None, "status": "under-declared", "seconds": 0.25,
             "message": "works without being declared: float64"},
        ],
        "kernels": [],
        "rates": [],
        "foreign_warnings": ["UserWarning: careful (vendor/core.py)"],
        "under_declared": ["float64"],
        "expected_failures": [],
    }  # fmt: skip


def test_a_run_that_is_not_complete_reaches_nothing() -> None:
    results = [TestResult("a", demand_of(), "passed")]
    assert level_results(results, 0, complete=True)[0].state == "reached"
    assert level_results(results, 0, complete=False)[0].state == "incomplete"
