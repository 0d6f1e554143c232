"""The rules of the conformance suite, tried on tiny suites: what counts as what, and which level is reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from toy_suite import SuiteOutcome, ToySuite

RULES = """
@requires(level=0, must="The mandatory core works.")
def test_core(accelerator):
    assert accelerator.name == "toy:0"

@requires(level=0, must="Views alias.", needs="views")
def test_views():
    raise RuntimeError("no views here")

@requires(level=0, must="Without views a view is refused.", without="views")
def test_without_views():
    pass

@requires(level=0, must="Doubles exist.", needs="float64")
def test_doubles():
    assert 1 + 1 == 2

@requires(level=0, must="Every dtype works.", needs=lambda dtype: f"dtypes:{dtype}")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype):
    assert dtype != "float16"

@requires(level=0, must="Ranks start.", needs=lambda ranks: f"ranks:{ranks}")
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks(ranks):
    pass
"""
CORE = "test_l0_rules.py::"


@pytest.fixture
def suite(tmp_path: Path) -> ToySuite:
    return ToySuite(tmp_path)


def run_rules(suite: ToySuite, **declared: object) -> SuiteOutcome:
    suite.write("test_l0_rules.py", RULES)
    return suite.run(capabilities=declared, variables={"TOY_DEVICES": "2"})


def test_what_is_not_declared_is_probed_and_cannot_fail(suite: ToySuite) -> None:
    outcome = run_rules(suite)
    assert outcome.status == 0, outcome.output
    assert outcome.statuses == {
        CORE + "test_core": "passed",
        CORE + "test_views": "not declared",
        CORE + "test_without_views": "passed",
        CORE + "test_doubles": "under-declared",
        CORE + "test_dtypes[float32]": "passed",
        CORE + "test_dtypes[bfloat16]": "under-declared",
        CORE + "test_dtypes[float16]": "not declared",
        CORE + "test_ranks[1]": "passed",
        CORE + "test_ranks[2]": "passed",
        CORE + "test_ranks[4]": "no hardware",
    }
    assert outcome.report["under_declared"] == ["dtypes:bfloat16", "float64"]
    assert outcome.message(CORE + "test_views") == "RuntimeError: no views here"
    assert outcome.report["level"] == 0
    said = "Level 0 is reached. That holds for 2 ranks: 1 test needs more devices than this machine has."
    assert said in outcome.output


def test_what_is_declared_and_fails_fails(suite: ToySuite) -> None:
    outcome = run_rules(suite, views=True)
    assert outcome.status == 1
    assert outcome.statuses[CORE + "test_views"] == "failed"
    assert outcome.message(CORE + "test_views").startswith("RuntimeError: no views here\n")
    assert outcome.statuses[CORE + "test_without_views"] == "not applicable"
    assert outcome.states == {0: "failed"}
    assert outcome.report["level"] is None
    assert "No level is reached." in outcome.output


def test_ids_do_not_depend_on_the_backend(suite: ToySuite) -> None:
    little = run_rules(suite)
    much = run_rules(suite, float64=True, shared_device=True, dtypes=["float32", "bfloat16"])
    assert list(little.statuses) == list(much.statuses)
    assert much.statuses[CORE + "test_ranks[4]"] == "passed"
    assert much.statuses[CORE + "test_doubles"] == "passed"
    assert (little.report["most_ranks"], much.report["most_ranks"]) == (2, 4)


def test_a_capability_works_only_if_all_its_probes_pass(suite: ToySuite) -> None:
    suite.write(
        "test_l0_half.py",
        """
        @requires(level=0, must="It holds.")
        def test_core(): pass

        @requires(level=0, must="Doubles exist.", needs="float64")
        @pytest.mark.parametrize("half", [0, 1])
        def test_doubles(half):
            assert half == 0
        """,
    )
    outcome = suite.run()
    assert outcome.statuses["test_l0_half.py::test_doubles[0]"] == "under-declared"
    assert outcome.report["under_declared"] == []


def test_probes_run_last_so_that_they_cannot_disturb(suite: ToySuite) -> None:
    suite.write(
        "test_l0_order.py",
        """
        SPOILED = []

        @requires(level=0, must="Doubles exist.", needs="float64")
        def test_probe():
            SPOILED.append(1)
            raise RuntimeError("half way")

        @requires(level=0, must="It holds.")
        def test_core():
            assert not SPOILED
        """,
    )
    outcome = suite.run()
    assert outcome.statuses["test_l0_order.py::test_core"] == "passed"
    assert outcome.statuses["test_l0_order.py::test_probe"] == "not declared"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("pytest.skip('not today')", "Skips are forbidden inside a claimed level: not today"),
        ("pytest.xfail('known')", "Skips are forbidden inside a claimed level: known"),
        ("pytest.importorskip('no_such_module')", "Skips are forbidden inside a claimed level: could not import"),
        ("import warnings; warnings.warn('careful')", "UserWarning: careful"),
        ("assert 1 == 2, 'sums'", "AssertionError: sums"),
    ],
    ids=["skip", "xfail", "importorskip", "warning", "assert"],
)
def test_skips_and_warnings_are_failures(suite: ToySuite, body: str, message: str) -> None:
    suite.write("test_l0_one.py", f'@requires(level=0, must="It holds.")\ndef test_one():\n    {body}\n')
    outcome = suite.run()
    assert outcome.status == 1
    assert outcome.statuses == {"test_l0_one.py::test_one": "failed"}
    assert outcome.message("test_l0_one.py::test_one").startswith(message)


def test_a_warning_that_a_test_ignores_is_no_failure(suite: ToySuite) -> None:
    mark = "@pytest.mark.filterwarnings('ignore:careful')"
    body = "def test_one():\n    import warnings; warnings.warn('careful')\n"
    suite.write("test_l0_one.py", f'{mark}\n@requires(level=0, must="It holds.")\n{body}')
    assert suite.run().statuses == {"test_l0_one.py::test_one": "passed"}


VENDOR = """
import toy_workers

@requires(level=0, must="A framework may warn.")
def test_here():
    import vendor
    vendor.warn("here")

@requires(level=0, must="It may on ranks.")
def test_on_ranks(run):
    assert run(toy_workers.use_vendor, 1) == [None]

@requires(level=0, must="Nobody else may.")
def test_own():
    toy_workers.warn()

@requires(level=0, must="Nobody else may on ranks.")
def test_own_on_ranks(run):
    run(toy_workers.warn, 1)
"""


def test_warnings_of_packages_of_others_are_reported_and_no_failures(suite: ToySuite) -> None:
    metadata = suite.site / "vendor-3.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vendor\nVersion: 3.0\n")
    (metadata / "top_level.txt").write_text("vendor\n")
    source = "import warnings\ndef warn(where):\n    warnings.warn(f'old things {where}', DeprecationWarning)\n"
    (suite.site / "vendor.py").write_text(source)
    (suite.site / "toy_workers.py").write_text(
        "import warnings\n"
        "def use_vendor():\n    import vendor\n    vendor.warn('there')\n"
        "def warn():\n    warnings.warn('own things')\n"
    )
    suite.write("test_l0_vendor.py", VENDOR)
    outcome = suite.run()
    assert [outcome.statuses[f"test_l0_vendor.py::test_{name}"] for name in ("here", "on_ranks")] == ["passed"] * 2
    assert outcome.message("test_l0_vendor.py::test_own").startswith("UserWarning: own things")
    assert outcome.message("test_l0_vendor.py::test_own_on_ranks").startswith("Rank 0: UserWarning: own things")
    assert outcome.report["foreign_warnings"] == [
        "DeprecationWarning: old things here (site/vendor.py)",
        "DeprecationWarning: old things there (site/vendor.py)",
    ]
    assert "Packages of others gave 2 warnings" in outcome.output


@pytest.mark.parametrize("mark", ["@pytest.mark.skip(reason='later')", "@pytest.mark.xfail(strict=False)"])
def test_marks_that_excuse_a_test_are_failures(suite: ToySuite, mark: str) -> None:
    suite.write("test_l0_one.py", f'{mark}\n@requires(level=0, must="It holds.")\ndef test_one(): pass\n')
    outcome = suite.run()
    assert (outcome.status, outcome.states) == (1, {0: "failed"})


def test_a_fixture_that_fails_fails_its_test(suite: ToySuite) -> None:
    suite.write(
        "test_l0_fixtures.py",
        """
        @pytest.fixture
        def broken():
            raise RuntimeError("no fixture")

        @pytest.fixture
        def leaking():
            yield
            raise RuntimeError("left behind")

        @requires(level=0, must="Setup works.")
        def test_setup(broken): pass

        @requires(level=0, must="Teardown works.")
        def test_teardown(leaking): pass
        """,
    )
    outcome = suite.run()
    assert outcome.status == 1
    assert outcome.message("test_l0_fixtures.py::test_setup").startswith("In setup: RuntimeError: no fixture")
    assert outcome.message("test_l0_fixtures.py::test_teardown").startswith("In teardown: RuntimeError: left behind")
