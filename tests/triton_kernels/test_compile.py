"""Every variant compiles for a GPU that is not there, and a program that could not run on one is found."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.runtime.interpreter import InterpretedFunction

from windlass.backends.triton.compile import DEFAULT_TARGETS, PACKAGE, SHARED_MEMORY, find_families, main, variants_of
from windlass.backends.triton.kernels import FAMILIES

ROOT = Path(__file__).parents[2]
ROUNDED_AS_THE_REFERENCE = ("adamw", "adamw_many", "momentum")
"""Families that promise the reference's bits: products and sums, roots and quotients, each rounded once."""


def compiling(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, in which kernels are compiled; here they are interpreted."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


@cache
def results() -> list[dict[str, Any]]:
    done = compiling("-m", f"{PACKAGE}.compile", "--json")
    assert done.stdout, done.stderr
    compiled: list[dict[str, Any]] = json.loads(done.stdout)
    assert done.returncode == any(one["problem"] for one in compiled)
    return compiled


@pytest.mark.timeout(600)
def test_every_variant_is_fit_to_run() -> None:
    assert [one for one in results() if one["problem"]] == []
    wanted = {
        (family, variant.name, target)
        for family in find_families()
        for variant in variants_of(family)
        for target in DEFAULT_TARGETS
    }
    assert {(one["family"], one["variant"], one["target"]) for one in results()} == wanted
    assert len(wanted) == len(results()), "two variants of one family have one name"


def test_every_function_of_every_family_is_compiled() -> None:
    """Each is launched by a variant, or called by one that is."""
    names = sorted(path.stem for path in (ROOT / "backends" / "triton").glob("[!_]*.py"))
    modules = [importlib.import_module(f"{PACKAGE}.{name}") for name in names]
    functions = {value.__name__: value for module in modules for value in vars(module).values() if is_kernel(value)}
    reached = {variant.function.__name__ for family in find_families() for variant in variants_of(family)}
    waiting = list(reached)
    while waiting:
        called = functions[waiting.pop()].fn.__code__.co_names
        waiting += (found := functions.keys() & set(called) - reached)
        reached |= found
    assert reached == functions.keys()
    assert len(reached) > len(FAMILIES)


def is_kernel(value: object) -> bool:
    return isinstance(value, triton.JITFunction | InterpretedFunction)


def test_registers_are_limited_where_a_variant_says_so() -> None:
    limits = {
        (family, variant.name): variant.max_registers for family in find_families() for variant in variants_of(family)
    }
    limited = [one for one in results() if limits[one["family"], one["variant"]] is not None]
    assert len(limited) == 2 * len(DEFAULT_TARGETS)  # the symmetric products in 16 bits with something added
    for one in limited:
        assert one["registers"] <= limits[one["family"], one["variant"]]


def test_kernels_that_promise_bits_keep_subnormal_numbers() -> None:
    families = {f"{PACKAGE}.{family}" for family in ROUNDED_AS_THE_REFERENCE}
    assert [one for one in results() if one["family"] in families and one["flushes_subnormals"]] == []


@pytest.mark.timeout(600)
def test_what_could_not_run_is_found() -> None:
    code = (
        "import json; from dataclasses import asdict\n"
        "from windlass.backends.triton.compile import measure_variant\n"
        "done = [measure_variant('triton_broken_kernels', index, 'sm_80') for index in range(5)]\n"
        "print(json.dumps([asdict(one) | {'problem': one.problem} for one in done]))"
    )
    done = compiling("-c", code)
    assert done.returncode == 0, done.stderr
    fits, spills, wide, stores, forgets = json.loads(done.stdout)
    assert (fits["problem"], fits["spilled_bytes"], fits["error"]) == ("", 0, "")
    assert 0 < fits["registers"] <= 255
    assert spills["problem"] == f"spills {spills['spilled_bytes']} bytes per thread"
    # A thread holds 16384 / 32 numbers of 4 bytes, and has registers for less than half of them.
    assert spills["spilled_bytes"] >= 1024
    assert wide["shared_bytes"] >= 2 * 256 * 256 * 2 > SHARED_MEMORY["sm_80"]  # both blocks, in 2 bytes each
    assert "bytes of shared memory where sm_80 has 166912" in wide["problem"] or wide["spilled_bytes"]
    assert stores["problem"].startswith("does not compile: ")
    assert "Unsupported ptr type" in stores["problem"]
    assert "the arguments of double differ in values" in forgets["problem"]


def test_nothing_is_compiled_by_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("nothing can be compiled: TRITON_INTERPRET is set")
    assert errors.count("\n") == 1
