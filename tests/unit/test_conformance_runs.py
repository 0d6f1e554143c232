"""How the conformance suite starts and ends: time limits, the caller's environment, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from toy_suite import ToySuite


@pytest.fixture
def suite(tmp_path: Path) -> ToySuite:
    return ToySuite(tmp_path)


HANGING = """
import time

@requires(level=0, must="It ends.")
@pytest.mark.timeout({limit}, method="signal")
def test_hangs():
    time.sleep(60)

@requires(level=0, must="It goes on.")
def test_later(request):
    assert request.node.get_closest_marker("timeout").args == (60.0,)

@requires(level=0, must="Ranks have more time.")
def test_ranks(request, run):
    assert request.node.get_closest_marker("timeout").args == (150.0,)
"""


def test_a_test_that_hangs_fails_and_the_run_goes_on(suite: ToySuite) -> None:
    suite.write("test_l0_hang.py", HANGING.format(limit=0.5))
    outcome = suite.run()
    assert outcome.status == 1
    assert outcome.message("test_l0_hang.py::test_hangs").startswith("Failed: Timeout (>0.5s)")
    assert [outcome.statuses[f"test_l0_hang.py::{name}"] for name in ("test_later", "test_ranks")] == ["passed"] * 2


def test_a_lazy_device_has_more_time(suite: ToySuite) -> None:
    suite.write(
        "test_l0_time.py",
        """
        @requires(level=0, must="Compiling takes time.")
        def test_one(request):
            assert request.node.get_closest_marker("timeout").args == (240.0,)

        @requires(level=0, must="A limit of its own stays.")
        @pytest.mark.timeout(7.0, method="signal")
        def test_own(request):
            assert request.node.get_closest_marker("timeout").args == (7.0,)
        """,
    )
    assert list(suite.run(capabilities={"lazy": True}).statuses.values()) == ["passed"] * 2


def test_native_code_that_hangs_ends_the_run_and_says_where(suite: ToySuite) -> None:
    native = """
    import signal, time
    import windlass.conformance.suite_run as suite_run
    suite_run._GRACE_SECONDS = 0.5  # read when the test begins

    @requires(level=0, must="It ends.")
    @pytest.mark.timeout(0.5, method="signal")
    def test_hangs():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # as if no signal came through
        time.sleep(60)
    """
    suite.write("test_l0_hang.py", native)
    outcome = suite.run()
    assert outcome.status == 1
    assert "Timeout (0:00:01)!" in outcome.output
    assert "in test_hangs" in outcome.output
    assert outcome.report == {}


def test_the_callers_job_does_not_disturb(suite: ToySuite) -> None:
    suite.write(
        "test_l0_job.py",
        """
        import os
        import toy_workers

        @requires(level=0, must="One rank is alone.")
        def test_alone():
            assert "RANK" not in os.environ and os.environ["WINDLASS_ACCELERATOR"] == "toy"

        @requires(level=0, must="Ranks find their place.", needs="ranks:2")
        def test_ranks(run):
            assert run(toy_workers.place, 2, "x") == [("0", "2", "toy:0", "x"), ("1", "2", "toy:0", "x")]

        @requires(level=0, must="A rank that fails is named.", needs="ranks:2")
        def test_failing_rank(run):
            run(toy_workers.fail, 2)
        """,
    )
    (suite.site / "toy_workers.py").write_text(
        "import os\n"
        "def place(word):\n"
        "    return (*(os.environ[name] for name in ('RANK', 'WORLD_SIZE', 'WINDLASS_ACCELERATOR')), word)\n"
        "def fail():\n"
        "    assert os.environ['RANK'] == '0', 'the other one'\n"
    )
    job = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "WINDLASS_ACCELERATOR": "nothing"}
    outcome = suite.run(capabilities={"shared_device": True}, variables=job)
    assert list(outcome.statuses.values()) == ["passed", "failed", "passed"], outcome.output
    assert outcome.message("test_l0_job.py::test_failing_rank").startswith("Rank 1: AssertionError: the other one\n")


EXCLUSIVE = """
import toy_workers

@requires(level=0, must="Each test has an open device.")
@pytest.mark.parametrize("number", range(2))
def test_open(accelerator, number):
    assert accelerator._lock

@requires(level=0, must="Ranks open it too.")
@pytest.mark.parametrize("number", range(2))
def test_ranks(accelerator, run, number):
    assert run(toy_workers.open_and_close, 1) == ["toy:0"]

@requires(level=0, must="Ranks that fail do no harm.")
def test_failing_rank(run):
    with pytest.raises(Exception, match="the toy broke"):
        run(toy_workers.fail, 1)

@requires(level=0, must="It is open again.")
def test_reopened(accelerator):
    assert accelerator._lock
"""


def test_a_device_that_is_not_shared_is_closed_while_ranks_run(suite: ToySuite, tmp_path: Path) -> None:
    suite.write("test_l0_exclusive.py", EXCLUSIVE)
    (suite.site / "toy_workers.py").write_text(
        "import contextlib, windlass\n"
        "def open_and_close():\n"
        "    with contextlib.closing(windlass.open_accelerator()) as accelerator:\n"
        "        return accelerator.name\n"
        "def fail():\n"
        "    raise ArithmeticError('the toy broke')\n"
    )
    lock = tmp_path / "lock"
    outcome = suite.run(variables={"TOY_LOCK": str(lock)})
    assert list(outcome.statuses.values()) == ["passed"] * 6, outcome.output
    assert not lock.exists()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("def test_one(): pass", "a test of the suite says what it demands, decorate it with @requires."),
        (
            '@requires(level=1, must="It holds.")\ndef test_one(): pass',
            "a test of level 1 lives in a file test_l1_*.py.",
        ),
        (
            '@requires(level=0, must="It holds.", needs=lambda dtype: dtype)\ndef test_one(): pass',
            "the test is not parametrised by dtype, for which its requirement asks.",
        ),
        (
            '@requires(level=0, must="It holds.", needs=lambda: "vews")\ndef test_one(): pass',
            "there is no capability 'vews'; they are",
        ),
    ],
    ids=["bare", "level", "parameter", "capability"],
)
def test_a_malformed_test_is_a_usage_error(suite: ToySuite, body: str, sentence: str) -> None:
    suite.write("test_l0_one.py", body)
    outcome = suite.run()
    assert outcome.status == pytest.ExitCode.USAGE_ERROR
    assert f"test_l0_one.py::test_one: {sentence}" in outcome.output


@pytest.mark.parametrize(
    ("accelerator", "variables", "status", "sentence"),
    [
        ("toys", {}, 4, "no backend named 'toys' is installed"),
        ("toy:x", {}, 4, "the argument names accelerator 'toy:x', which is not of the form 'cpu' or 'cuda:1'."),
        ("auto", {}, 4, "name one backend to test, 'auto' leaves the choice open"),
        ("toy", {"TOY_DEVICES": "0"}, 1, "backend 'toy' cannot be used here: no toy is plugged in."),
        ("toy:1", {}, 1, "there is no device 'toy:1': backend 'toy' has 1, counted from 0 (toy 0)."),
        ("toy", {"WINDLASS_TIMEOUT": "soon"}, 4, "WINDLASS_TIMEOUT must be a number of seconds above 0, got 'soon'"),
    ],
)
def test_a_backend_that_does_not_open_is_one_sentence(
    tmp_path: Path, accelerator: str, variables: dict[str, str], status: int, sentence: str
) -> None:
    suite = ToySuite(tmp_path, accelerator)
    suite.write("test_l0_one.py", '@requires(level=0, must="It holds.")\ndef test_one(): pass\n')
    outcome = suite.run(variables=variables)
    assert outcome.status == status, outcome.output
    assert sentence in outcome.output
    assert "Traceback" not in outcome.output


def test_a_device_that_does_not_close_fails_the_run(suite: ToySuite) -> None:
    suite.write("test_l0_one.py", '@requires(level=0, must="It holds.")\ndef test_one(): pass\n')
    outcome = suite.run(variables={"TOY_CLOSES": "badly"})
    assert outcome.status == 1
    assert outcome.report["problems"] == ["toy:0 does not close: the toy is stuck."]
    assert outcome.report["level"] is None


def test_a_run_without_a_backend_or_a_time_limit_is_refused(suite: ToySuite) -> None:
    suite.write("test_l0_one.py", '@requires(level=0, must="It holds.")\ndef test_one(): pass\n')
    outcome = suite.run(plugins=["windlass.conformance.plugin"])
    assert outcome.status == pytest.ExitCode.USAGE_ERROR
    assert "pip install 'windlass[conform]'" in outcome.output
    suite.accelerator = ""
    outcome = suite.run()
    assert outcome.status == pytest.ExitCode.USAGE_ERROR
    assert "name the backend under test by --accelerator, as in --accelerator cpu." in outcome.output
