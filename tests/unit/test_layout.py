"""What is shipped is what is in the tree: the package list, the wheel and the source distribution."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import windlass

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE_FOLDERS: dict[str, str] = SETTINGS["tool"]["setuptools"]["package-dir"]
# Left out of a copy of the tree, and so of what the distributions are compared with.
LEFT_OVERS = shutil.ignore_patterns(
    ".git", ".venv*", "__pycache__", "*.pyc", "*.egg-info", "build", "dist", "runs", ".*_cache", ".cache", "htmlcov"
)


def shipped_files() -> Iterator[tuple[str, Path]]:
    """Each file under the package folders: its path in the wheel, and where it lies."""
    for package, folder in PACKAGE_FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}", path


def test_package_list_equals_folders() -> None:
    folders = {name.rpartition("/")[0].replace("/", ".") for name, path in shipped_files() if path.suffix == ".py"}
    assert sorted(set(SETTINGS["tool"]["setuptools"]["packages"]) ^ folders) == []


def test_every_package_has_an_init() -> None:
    names = {name for name, _ in shipped_files()}
    missing = [
        name
        for name in SETTINGS["tool"]["setuptools"]["packages"]
        if f"{name.replace('.', '/')}/__init__.py" not in names
    ]
    assert missing == []


def test_every_mapped_folder_is_typed() -> None:
    assert [folder for folder in PACKAGE_FOLDERS.values() if not (ROOT / folder / "py.typed").is_file()] == []


def test_every_backend_folder_is_registered() -> None:
    """All but those that other backends stand on and nobody can open."""
    registered = set(SETTINGS["project"]["entry-points"]["windlass.backends"].values())
    folders = {f"windlass.backends.{path.parent.name}" for path in ROOT.glob("backends/*/__init__.py")}
    assert registered == folders - {"windlass.backends.generic", "windlass.backends.triton"}
    assert "hookimpl" not in (ROOT / "backends" / "generic" / "__init__.py").read_text()


def test_version_is_said_once() -> None:
    assert importlib.metadata.version("windlass") == windlass.__version__


class Distributions(NamedTuple):
    """File names in a copy of the tree, in the source distribution made of it, and in the wheel made of that."""

    in_tree: set[str]
    in_source: set[str]
    in_wheel: set[str]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    place = tmp_path_factory.mktemp("distributions")
    tree = shutil.copytree(ROOT, place / "tree", ignore=LEFT_OVERS, symlinks=True)
    in_tree = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    build(tree, "sdist", place)
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(place / "unpacked", filter="data")
        in_source = {member.name.partition("/")[2] for member in source.getmembers() if member.isfile()}
    (unpacked,) = (place / "unpacked").iterdir()
    build(unpacked, "wheel", place)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        return Distributions(in_tree, in_source, set(packed.namelist()))


def build(tree: Path, kind: str, place: Path) -> None:
    """Call the build backend as a build front end does, with the setuptools at hand instead of one from an index."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(place)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_equals_tree(distributions: Distributions) -> None:
    modules = {name for name in distributions.in_wheel if ".dist-info/" not in name}
    assert sorted(modules ^ {name for name, _ in shipped_files()}) == []
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in distributions.in_wheel)


def test_source_distribution_equals_tree(distributions: Distributions) -> None:
    made = {"PKG-INFO", "setup.cfg"}
    shipped = {name for name in distributions.in_source - made if ".egg-info/" not in name}
    assert ".ci/run" in shipped
    # typings/ holds links for type checkers; other hidden files at the root belong to tools.
    different = {name for name in shipped ^ distributions.in_tree if not name.startswith(("typings/", "."))}
    assert sorted(different) == [], "name these in MANIFEST.in, or keep them out of the tree (runs/ is ignored)"
