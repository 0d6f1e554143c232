"""The golden list of the conformance suite is up to date, and it says what a reader of a report must know."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from fake_plugins import raises_sentence
from toy_suite import golden_entry
from windlass.accelerator.interface import Capabilities
from windlass.accelerator.reference import SCHEMAS
from windlass.conformance.golden import (
    collect_entries,
    differences,
    missing_ids,
    read_golden,
    write_golden,
)
from windlass.conformance.requirements import LEVELS, check_need

FLAGS = sorted(field.name for field in fields(Capabilities) if isinstance(field.default, bool))
LISTS = sorted({field.name for field in fields(Capabilities)} - set(FLAGS))


@pytest.fixture(scope="module")
def golden() -> list[dict[str, Any]]:
    return read_golden()


def function_of(entry: dict[str, Any]) -> str:
    """A test without its parameters."""
    name: str = entry["id"]
    return name.partition("[")[0]


def needed(entry: dict[str, Any]) -> set[str]:
    return {name.partition(":")[0] for name in entry["needs"]}


def test_the_list_is_up_to_date() -> None:
    command = [sys.executable, "-m", "windlass.conformance.golden", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\npython -m windlass.conformance.golden --write renews it."


@pytest.mark.parametrize("level", [level for level in LEVELS if level != 4])
def test_every_level_has_tests(golden: list[dict[str, Any]], level: int) -> None:
    assert [entry for entry in golden if entry["level"] == level]


@pytest.mark.parametrize("capability", FLAGS)
def test_every_capability_has_a_positive_and_a_negative_test(golden: list[dict[str, Any]], capability: str) -> None:
    assert [entry["id"] for entry in golden if capability in needed(entry)], "no test needs it"
    assert [entry["id"] for entry in golden if entry["without"] == capability], "no test is about its absence"


@pytest.mark.parametrize("capability", LISTS)
def test_every_list_of_dtypes_has_a_positive_and_a_negative_test(golden: list[dict[str, Any]], capability: str) -> None:
    assert [entry["id"] for entry in golden if capability in needed(entry)], "no test needs a value of it"
    without = [entry["id"] for entry in golden if (entry["without"] or "").startswith(f"{capability}:")]
    assert without, "no test is about a value's absence"


def test_the_mandatory_core_has_tests_at_the_levels_of_device_kernels_and_collectives(
    golden: list[dict[str, Any]],
) -> None:
    core = {entry["level"] for entry in golden if not needed(entry) - {"ranks", "dtypes"} and entry["without"] is None}
    assert core >= {0, 1, 2, 3}


def test_every_must_is_one_sentence_of_its_own(golden: list[dict[str, Any]]) -> None:
    said: dict[str, str] = {}
    kernels = {schema.name for schema in SCHEMAS}
    for entry in golden:
        must = entry["must"]
        first = must.split()[0]
        assert first[0].isupper() or not first.isalpha() or first in kernels, entry  # a name keeps its small letter
        assert must.endswith("."), entry
        assert ". " not in must, f"{entry['id']} says two sentences: {must}"
        assert len(must) <= 200, entry
        assert said.setdefault(must, function_of(entry)) == function_of(entry), f"said twice: {must}"


def test_every_need_is_a_capability(golden: list[dict[str, Any]]) -> None:
    for entry in golden:
        for name in [*entry["needs"], *([entry["without"]] if entry["without"] else [])]:
            check_need(name)  # raises ValueError otherwise
        assert entry["level"] in LEVELS


def test_the_parameters_of_a_test_share_their_sentence(golden: list[dict[str, Any]]) -> None:
    sentences: dict[str, set[str]] = {}
    for entry in golden:
        sentences.setdefault(function_of(entry), set()).add(entry["must"])
    assert [name for name, musts in sentences.items() if len(musts) > 1] == []


def test_a_test_that_is_lost_new_or_reworded_is_a_difference() -> None:
    kept, lost, new = (golden_entry(f"test_l0_a.py::test_{name}") for name in ("kept", "lost", "new"))
    reworded = kept | {"must": "It nearly holds."}
    assert differences([kept, lost], [kept, lost]) == []
    assert differences([kept, lost], [reworded, new]) == [
        "changed: test_l0_a.py::test_kept: must was 'It holds.', is 'It nearly holds.'",
        "missing: test_l0_a.py::test_lost",
        "new: test_l0_a.py::test_new",
    ]


def test_only_the_levels_asked_for_are_missed() -> None:
    entries = [golden_entry("a", 0), golden_entry("b", 1), golden_entry("c", 2)]
    assert missing_ids(entries, ["a"], 1) == ["b"]
    assert missing_ids(entries, [], 2) == ["a", "b", "c"]


def test_a_suite_is_collected_and_written_and_read_back(tmp_path: Path) -> None:
    suite = tmp_path / "suite"
    suite.mkdir()
    (suite / "test_l1_toy.py").write_text(
        "import pytest\n"
        "from windlass.conformance.requirements import requires\n"
        "@requires(level=1, must='It holds.', needs=lambda n: (f'ranks:{n}', 'views'), since='1.1')\n"
        "@pytest.mark.parametrize('n', [2, 1])\n"
        "def test_toy(n, no_such_fixture_is_asked_for): pass\n"
        "@requires(level=1, must='It is refused.', without='views')\n"
        "def test_refused(): pass\n"
    )
    code = (
        "import sys; from pathlib import Path; from windlass.conformance.golden import collect_entries, write_golden; "
        "write_golden(collect_entries(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    subprocess.run([sys.executable, "-c", code, str(suite), str(tmp_path / "golden.json")], check=True, timeout=60)
    toy = {"level": 1, "must": "It holds.", "without": None, "since": "1.1"}
    refused = {"level": 1, "must": "It is refused.", "needs": [], "without": "views", "since": "1.0"}
    assert read_golden(tmp_path / "golden.json") == [
        {"id": "test_l1_toy.py::test_refused", **refused},
        {"id": "test_l1_toy.py::test_toy[1]", "needs": ["ranks:1", "views"], **toy},
        {"id": "test_l1_toy.py::test_toy[2]", "needs": ["ranks:2", "views"], **toy},
    ]
    assert len((tmp_path / "golden.json").read_text().splitlines()) == 5  # one line per test


def test_a_suite_that_cannot_be_collected_says_why(tmp_path: Path) -> None:
    (tmp_path / "test_l0_toy.py").write_text("raise ImportError('no such luck')\n")
    with pytest.raises(RuntimeError, match="no such luck"):
        collect_entries(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", '[{"id": "a"}]'])
def test_a_broken_list_is_one_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "golden.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"golden\.json (cannot be read|must be a list)"):
        read_golden(path)


def test_an_empty_list_can_be_written(tmp_path: Path) -> None:
    write_golden([], tmp_path / "golden.json")
    assert read_golden(tmp_path / "golden.json") == []
    missing = tmp_path / "none.json"
    with raises_sentence(
        ValueError,
        f"{missing} cannot be read as the list of the suite's tests: [Errno 2] No such file or directory: '{missing}'",
    ):
        read_golden(missing)
