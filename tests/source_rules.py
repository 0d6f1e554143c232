"""The rules that keep the core portable, as checks over the syntax tree of a module.

Each rule has a name and finds the places that break it. Which rules hold for which folder is in
tests/unit/test_core_rules.py.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_VENDOR_ATTRIBUTES = ("cuda", "xpu", "mps", "mtia", "hpu", "npu", "xla", "accelerator")
VENDORS = (
    *(f"torch.{name}" for name in _VENDOR_ATTRIBUTES),
    *(f"torch.backends.{name}" for name in (*_VENDOR_ATTRIBUTES, "cudnn")),
    *("cupy", "intel_extension_for_pytorch", "jax", "jaxlib", "libtpu", "numba", "torch_npu", "torch_xla", "triton"),
)
FRAMEWORKS = ("torch", "jax", "jaxlib", "numpy", "numba", "torch_xla", "triton")

_DEVICE_WORD = re.compile(
    r"\b(cpu|gpu|tpu|npu|cuda|rocm|xla|xpu|mps|mtia|hpu|gloo|nccl|rccl|hccl|xccl|ucc)\b", re.IGNORECASE
)


@dataclass(frozen=True)
class Violation:
    """One place where a module breaks a rule."""

    rule: str
    line: int
    what: str  # the offending name or text


def is_within(name: str, packages: tuple[str, ...]) -> bool:
    """Whether the dotted `name` is one of `packages` or lies inside one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def dotted_name(node: ast.expr) -> str:
    """`torch.cuda.Stream` for such a chain of attributes; the empty string for anything that is not a plain chain."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        prefix = dotted_name(node.value)
        return f"{prefix}.{node.attr}" if prefix else ""
    return ""


def imported_names(node: ast.AST) -> list[str]:
    """What an import, or import_module called with a literal, names in full: `from a import b` is `a.b`."""
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            return [f"{'.' * level}{module or ''}.{alias.name}" for alias in names]
        case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
            if dotted_name(function) in ("__import__", "import_module", "importlib.import_module"):
                return [name]
    return []


def find_imports_of(*packages: str) -> Callable[[ast.Module], Iterator[tuple[int, str]]]:
    def find(tree: ast.Module) -> Iterator[tuple[int, str]]:
        for node in ast.walk(tree):
            for name in imported_names(node):
                if is_within(name, packages):
                    yield line_of(node), name

    return find


def find_imports_beyond(*packages: str) -> Callable[[ast.Module], Iterator[tuple[int, str]]]:
    """Imports of anything but `packages` and the standard library; a relative import hides what it names."""

    def find(tree: ast.Module) -> Iterator[tuple[int, str]]:
        for node in ast.walk(tree):
            for name in imported_names(node):
                if name.partition(".")[0] not in sys.stdlib_module_names and not is_within(name, packages):
                    yield line_of(node), name

    return find


def find_imports_at_import_time(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Frameworks imported when the module is: anywhere but in a function or under `if TYPE_CHECKING`."""

    def visit(nodes: list[ast.stmt]) -> Iterator[tuple[int, str]]:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            yield from ((node.lineno, name) for name in imported_names(node) if is_within(name, FRAMEWORKS))
            if isinstance(node, ast.If) and dotted_name(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                yield from visit(node.orelse)
                continue
            for block in ("body", "orelse", "finalbody"):
                yield from visit(getattr(node, block, []))
            for handler in getattr(node, "handlers", []):
                yield from visit(handler.body)

    yield from visit(tree.body)


def find_vendor_attributes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Uses of torch.cuda and its kind, and of tensor members that name a device: is_cuda, x.cuda()."""
    members = {f"is_{name}" for name in _VENDOR_ATTRIBUTES}
    calls = {"cuda", "xpu", "mtia", "hpu", "npu"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (dotted_name(node) in VENDORS or node.attr in members):
            yield node.lineno, dotted_name(node) or f".{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in calls:
            yield node.lineno, f".{node.func.attr}()"


def find_pointers(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Addresses and storages: on some devices every pointer is 0 and there is no storage to resize."""
    members = {"data_ptr", "untyped_storage", "const_data_ptr", "mutable_data_ptr"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in members:
            yield node.lineno, f".{node.attr}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "storage":
            yield node.lineno, ".storage()"


def find_streams(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Stream and event objects of torch, and record_stream: work is ordered by the interface's own Work and Event."""
    for node in ast.walk(tree):
        names = imported_names(node) if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.Attribute):
            names = [dotted_name(node)]
            if node.attr in ("record_stream", "current_stream"):
                yield node.lineno, f".{node.attr}"
        for name in names:
            if name.startswith("torch.") and name.rpartition(".")[2] in ("Stream", "Event"):
                yield line_of(node), name


def find_host_reads(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Calls that make the host wait for a device value; the accelerator's read_host is the one that is counted."""
    for node in ast.walk(tree):
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and called.attr in ("item", "tolist", "cpu", "numpy"):
            yield called.lineno, f".{called.attr}()"


def find_device_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """String literals in which a device or its collective library is named; docstrings may."""
    docstrings = {id(text) for text in _docstrings(tree)}
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and id(node) not in docstrings else None
        if isinstance(text, str) and _DEVICE_WORD.search(text.replace("_", " ")):
            yield line_of(node), repr(text)


def _docstrings(tree: ast.Module) -> Iterator[ast.Constant]:
    """Every string that stands alone as a statement: docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value


def line_of(node: ast.AST) -> int:
    return int(getattr(node, "lineno", 0))


RULES: dict[str, Callable[[ast.Module], Iterator[tuple[int, str]]]] = {
    "imports a backend": find_imports_of("windlass.backends", "backends"),
    "imports a vendor module": find_imports_of(*VENDORS),
    "imports a bare folder name": find_imports_of("accelerator", "core"),
    "imports beyond the core's reach": find_imports_beyond(
        "torch",
        "windlass.accelerator.interface",
        "windlass.accelerator.errors",
        "windlass.accelerator.polar",
        "windlass.core",
    ),
    "imports a framework at import time": find_imports_at_import_time,
    "uses a vendor's attribute": find_vendor_attributes,
    "uses a pointer or storage": find_pointers,
    "uses a stream object": find_streams,
    "reads a device value on the host": find_host_reads,
    "names a device": find_device_names,
}


def find_violations(source: str, rules: tuple[str, ...]) -> list[Violation]:
    """Where `source`, the text of a module, breaks `rules`, by line."""
    tree = ast.parse(source)
    found = [Violation(rule, line, what) for rule in rules for line, what in RULES[rule](tree)]
    return sorted(found, key=lambda violation: violation.line)
