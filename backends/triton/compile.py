"""Every variant of every kernel of this package, compiled ahead of time: no GPU is needed, only Triton.

``python -m windlass.backends.triton.compile [--target sm_90] [--json]`` prints what each takes of a multiprocessor, and
ends with exit code 1 where one does not compile, spills registers, or takes more shared memory than the target has.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from windlass.backends.triton.kernels import FAMILIES

if TYPE_CHECKING:
    from windlass.backends.triton.launch import Variant

PACKAGE: Final = "windlass.backends.triton"
SHARED_MEMORY: Final = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}
"""Bytes that one block may have, by target: CUDA C++ Programming Guide, technical specifications per compute
capability."""
DEFAULT_TARGETS: Final = ("sm_80", "sm_90")
_WIDTH: Final = 120  # of the table where it does not go to a terminal


@dataclass(frozen=True)
class Compiled:
    """What came of one variant for one target."""

    family: str  # the module, by its full name
    variant: str
    target: str
    seconds: float  # near 0 where Triton's cache has it
    registers: int = 0  # of one thread
    spilled_bytes: int = 0  # of one thread, on its stack in device memory
    shared_bytes: int = 0  # of one block
    flushes_subnormals: bool = False  # an instruction in PTX takes subnormal fp32 for zero
    error: str = ""  # why there is no program

    @property
    def problem(self) -> str:
        """What is wrong with it, in words; empty where nothing is."""
        if self.error:
            return f"does not compile: {self.error}"
        if self.spilled_bytes:
            return f"spills {self.spilled_bytes} bytes per thread"
        if self.shared_bytes > (limit := SHARED_MEMORY[self.target]):
            return f"takes {self.shared_bytes} bytes of shared memory where {self.target} has {limit}"
        return ""


def find_families() -> tuple[str, ...]:
    """The modules of this package that declare variants, by their full names."""
    return tuple(f"{PACKAGE}.{family}" for family in FAMILIES)


def variants_of(family: str) -> tuple[Variant, ...]:
    """What the kernels of one module are launched with."""
    variants: tuple[Variant, ...] = getattr(importlib.import_module(family), "VARIANTS", ())
    return variants


def compile_variant(variant: Variant, target: str) -> Any:
    """Triton's compiled kernel: its text in every stage is in `asm`, what it takes in `metadata`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.function.arg_names
    types = dict(variant.signature) | dict.fromkeys(variant.constants, "constexpr")
    if missing := sorted(set(names) ^ set(types)):
        raise ValueError(
            f"variant {variant.name!r} and the arguments of {variant.function.__name__} differ in "
            f"{', '.join(missing)}: name each argument in its signature or its constants"
        )
    source = ASTSource(
        fn=variant.function,
        signature={name: types[name] for name in names},
        constexprs=dict(variant.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return triton.compile(source, target=gpu, options=variant.options)


def measure_variant(family: str, index: int, target: str) -> Compiled:
    """Compile one variant and read what its program takes. What the compiler refuses is in `error`."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    variant, start = variants_of(family)[index], time.perf_counter()
    try:
        kernel = compile_variant(variant, target)
    except (CompilationError, PTXASError, OutOfResources, RuntimeError, ValueError) as error:
        return Compiled(family, variant.name, target, time.perf_counter() - start, error=str(error).strip())
    seconds = time.perf_counter() - start
    registers, stack = read_resources(kernel.asm["cubin"])
    return Compiled(
        family,
        variant.name,
        target,
        seconds,
        registers=registers,
        spilled_bytes=stack,
        shared_bytes=int(kernel.metadata.shared),
        flushes_subnormals=".ftz" in kernel.asm["ptx"],
    )


def read_resources(program: bytes) -> tuple[int, int]:
    """Registers and bytes on the stack of one thread, as cuobjdump, which comes with Triton, reads them.

    No kernel here has arrays of its own or calls functions, so all of its stack is spilled registers.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = re.search(r"\bREG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage says nothing of REG and STACK, it prints {text!r}")
    return int(found[1]), int(found[2])


def compile_everything(targets: Sequence[str] = DEFAULT_TARGETS) -> list[Compiled]:
    """All variants for all targets, in as many processes as there are cores."""
    jobs = [
        (family, index, target)
        for family in find_families()
        for index in range(len(variants_of(family)))
        for target in targets
    ]
    if not jobs:
        return []
    processes = min(len(os.sched_getaffinity(0)), len(jobs))
    # Each has its own interpreter: torch has threads here already, and those do not live on in a fork.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(measure_variant, *zip(*jobs, strict=True)))


def make_table(results: Iterable[Compiled]) -> Table:
    """One row for each program; what is wrong is red."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("Kernels", overflow="fold")
    table.add_column("Variant", overflow="fold")
    table.add_column("Target")
    for title in ("Registers", "Spilled B", "Shared B", "Seconds"):
        table.add_column(title, justify="right")
    for one in results:
        numbers = ("", "", "") if one.error else (str(one.registers), str(one.spilled_bytes), str(one.shared_bytes))
        table.add_row(
            _short(one), one.variant, one.target, *numbers, f"{one.seconds:.1f}", style="red" if one.problem else ""
        )
    return table


def _short(one: Compiled) -> str:
    return one.family.removeprefix(f"{PACKAGE}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every program is fit to run, 1 where one is not, 2 where Triton cannot compile at all."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {PACKAGE}.compile", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--target", action="append", choices=sorted(SHARED_MEMORY), help="default: sm_80 and sm_90")
    parser.add_argument("--json", action="store_true", help="print the results as JSON and nothing else")
    options = parser.parse_args(arguments)
    try:
        from triton import knobs
    except ImportError as error:
        print(f"nothing can be compiled: triton does not load ({error}); pip install triton", file=sys.stderr)
        return 2
    if knobs.runtime.interpret:
        print(
            "nothing can be compiled: TRITON_INTERPRET is set, which makes interpreted functions of all kernels; unset "
            "it for this command",
            file=sys.stderr,
        )
        return 2
    results = compile_everything(options.target or DEFAULT_TARGETS)
    problems = [one for one in results if one.problem]
    if options.json:
        print(json.dumps([asdict(one) | {"problem": one.problem} for one in results], indent=1))
    else:
        console = Console(width=None if sys.stdout.isatty() else _WIDTH)
        console.print(make_table(results))
        for one in problems:
            console.print(Text(f"\n{_short(one)} {one.variant} for {one.target} {one.problem}", style="red"))
        fit = len(results) - len(problems)
        console.print(Text(f"\n{fit} of {len(results)} programs compile, keep to their registers and fit."))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
