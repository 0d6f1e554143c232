"""What the tests measured: the errors of kernels against their bounds, and rates."""

from __future__ import annotations

import json
import math
from typing import Any, Final

from windlass.accelerator.kernels import Kernels

_FIELDS: Final = {
    "kernel": ("name", "implementation", "error", "bound", "unit"),
    "rate": ("name", "value", "unit"),
}


class Measurements:
    """Facts that tests note for the report, in the order in which they were noted."""

    def __init__(self) -> None:
        self._notes: list[tuple[str, dict[str, Any]]] = []

    def note(self, kind: str, **values: Any) -> None:
        """Keep a JSON-ready fact of kind "kernel" or "rate"; ValueError if it lacks a field that the report shows."""
        if kind not in _FIELDS:
            raise ValueError(f"a measurement is one of {', '.join(_FIELDS)}, got {kind!r}")
        missing = [name for name in _FIELDS[kind] if name not in values]
        if missing:
            raise ValueError(f"a measurement of kind {kind!r} needs {', '.join(missing)}")
        plain = {name: _finite(value) for name, value in values.items()}
        json.dumps(plain, allow_nan=False)  # here, where the test that notes it is to blame
        self._notes.append((kind, plain))

    def rates(self) -> list[dict[str, Any]]:
        return [dict(values) for kind, values in self._notes if kind == "rate"]

    def kernels(self, kernels: Kernels) -> list[dict[str, Any]]:
        """Every kernel of the device: its implementations, what its schema allows, and what was measured."""
        chosen = kernels.chosen()
        return [
            {
                "name": name,
                "chosen": chosen[name],
                "implementations": sorted(kernel.implementation for kernel in kernels.implementations(name)),
                "tolerance": schema.tolerance,
                "rounding": schema.rounding,
                "cases": self._cases(name),
            }
            for name, schema in sorted(kernels.schemas.items())
        ]

    def _cases(self, kernel: str) -> list[dict[str, Any]]:
        cases = []
        for kind, values in self._notes:
            if kind == "kernel" and values["name"] == kernel:
                words = (values.get("dtype"), values.get("case"))
                case = {"implementation": values["implementation"], "case": " ".join(word for word in words if word)}
                cases.append(case | {name: values[name] for name in ("error", "bound", "unit")})
        return cases


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN; the report says null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
