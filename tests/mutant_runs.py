"""Runs of pytest on mutants, each in a process of its own, and what they found.

The processes are forked from one that has imported torch and pytest, which would take most of a run's time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

import windlass.conformance
from mutant_backend import NAME, VARIABLE
from mutations import Mutation

ROOT: Final = Path(__file__).resolve().parents[1]
SUITE: Final = Path(windlass.conformance.__file__).parent
_AT_ONCE: Final = 2
_LIMIT_SECONDS: Final = 200.0
_WIDTH: Final = 100  # of a message in the table
_PRELOADED: Final = [
    "torch",
    "torch.distributed",
    "numba",
    "pytest",
]  # nothing that pytest rewrites or mutations change


@dataclass(frozen=True)
class Ended:
    """One phase of one test."""

    id: str
    when: str  # "setup", "call" or "teardown"
    status: str
    message: str

    @property
    def failed(self) -> bool:
        return self.status == "failed"

    def summary(self) -> str:
        """The message in one line. Where ranks failed it is the last line of the first one's traceback."""
        text = self.message
        if "--- rank " in text:
            text = text.partition("--- rank ")[2].partition("--- rank ")[0].rstrip().rpartition("\n")[2]
        return textwrap.shorten(text, _WIDTH, placeholder=" ...")


@dataclass(frozen=True)
class Run:
    """One run of pytest."""

    status: int
    output: str
    phases: tuple[Ended, ...]

    def last_lines(self) -> str:
        return "\n".join(self.output.splitlines()[-30:])

    def of(self, test: str) -> list[Ended]:
        """The calls of the tests that an entry of `Mutation.where` stands for."""
        return [one for one in self.phases if one.when == "call" and stands_for(test, one.id)]


def stands_for(test: str, name: str) -> bool:
    """Whether an entry of `Mutation.where` stands for the test with this id."""
    return name == test or name.startswith((f"{test}[", f"{test}::"))


class MutantRuns:
    """Runs two at a time. A folder holds the metadata that makes the backend "mutant" known."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="windlass-mutants-")
        self._site = Path(self._folder.name, "site")
        metadata = self._site / "windlass_mutants-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: windlass-mutants\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[windlass.backends]\n{NAME} = mutant_backend\n")
        self._pool = ThreadPoolExecutor(_AT_ONCE)
        self._controls: dict[tuple[str, bool], Future[Run]] = {}
        self._mutants: dict[str, Future[Run]] = {}

    def start(self, chosen: Iterable[Mutation]) -> None:
        """Begin with everything: first the controls, which run all tests of a kind once on the whole backend."""
        mutations = list(chosen)
        wanted: dict[tuple[str, bool], dict[str, None]] = {}
        for one in mutations:
            tests = wanted.setdefault((one.base, one.is_seen_by_suite), {})
            tests.update(dict.fromkeys(one.where))
        for (base, by_suite), tests in wanted.items():
            future = self._pool.submit(self._run, f"control-{base}-{by_suite}", base, by_suite, tuple(tests), ())
            self._controls[base, by_suite] = future
        for one in mutations:
            arguments = ("--exitfirst",) if one.is_seen_by_suite else ("--exitfirst", f"--mutate={one.name}")
            self._mutants[one.name] = self._pool.submit(
                self._run, one.name, one.name, one.is_seen_by_suite, one.where, arguments
            )

    def control(self, mutation: Mutation) -> Run:
        return self._controls[mutation.base, mutation.is_seen_by_suite].result()

    def mutant(self, mutation: Mutation) -> Run:
        return self._mutants[mutation.name].result()

    def close(self) -> None:
        """Leave out what has not begun."""
        self._pool.shutdown(cancel_futures=True)
        self._folder.cleanup()

    def _run(self, label: str, mutant: str, by_suite: bool, tests: tuple[str, ...], options: tuple[str, ...]) -> Run:
        folder = Path(self._folder.name, label)
        folder.mkdir()
        outcomes = folder / "outcomes.jsonl"
        arguments = ["-p", "no:cacheprovider", "-p", "mutant_plugin", f"--outcomes={outcomes}", *options]
        if by_suite:
            arguments += ["-c", os.devnull, f"--rootdir={SUITE}", f"--accelerator={NAME}"]
            arguments += [str(SUITE / test) for test in tests]
        else:
            # The process has imported windlass on its way here, which is no fault of the tests.
            arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning", *tests]
        output = folder / "output.txt"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        working_folder = folder if by_suite else ROOT
        process = context.Process(
            target=_run_pytest,
            args=(arguments, self._environment(mutant), str(working_folder), str(output), self._site),
        )
        process.start()
        process.join(_LIMIT_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
        assert process.exitcode is not None
        lines = outcomes.read_text(encoding="utf-8").splitlines() if outcomes.is_file() else []
        phases = tuple(Ended(**json.loads(line)) for line in lines)
        return Run(process.exitcode, output.read_text(errors="replace"), phases)

    def _environment(self, mutant: str) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("WINDLASS_")}
        path = os.pathsep.join([str(self._site), str(ROOT / "tests")])
        return {**own, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", VARIABLE: mutant}


def _run_pytest(arguments: list[str], environment: Mapping[str, str], folder: str, output: str, site: Path) -> None:
    """What the process does: pytest, as if it had been started there with this environment."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path.insert(0, str(site))
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = pytest.main(arguments)
    sys.stdout.flush()
    sys.exit(int(status))


@dataclass(frozen=True)
class Verdict:
    """What a test run on a mutant came to."""

    mutation: Mutation
    caught_by: str = ""  # the id of the test that failed
    message: str = ""
    problem: str = ""  # why it does not count as caught

    def row(self) -> tuple[str, str, str, str]:
        """Mutant, what is broken, caught by, message."""
        mutant = f"{self.mutation.base}: {self.mutation.name}"
        return mutant, self.mutation.breaks, self.caught_by or f"NOT CAUGHT: {self.problem}", self.message


def judge(mutation: Mutation, control: Run, mutant: Run) -> Verdict:
    """A mutant is caught when a test fails on it that passes on the whole backend."""
    for test in mutation.where:
        calls = control.of(test)
        bad = [one for one in control.phases if stands_for(test, one.id) and one.failed]
        if bad:
            return Verdict(mutation, problem=f"on the whole backend {bad[0].id} fails: {bad[0].summary()}")
        if not any(one.status == "passed" for one in calls):
            reason = f"on the whole backend nothing passes that {test} stands for"
            return Verdict(mutation, problem=f"{reason}:\n{control.last_lines()}")
    failed = [one for one in mutant.phases if one.failed]
    if mutant.status == pytest.ExitCode.OK:
        return Verdict(mutation, problem="all tests pass")
    if mutant.status != pytest.ExitCode.TESTS_FAILED or not failed or failed[0].when != "call":
        reason = f"pytest ended with status {mutant.status} and no test that failed"
        return Verdict(mutation, problem=f"{reason}:\n{mutant.last_lines()}")
    return Verdict(mutation, failed[0].id, failed[0].summary())
