"""How matrices are orthogonalised on this device, by measurement: the dtype of products, and the form for each shape.

Operations say little about time where two ways are near each other: what a product costs depends on its shape and on
the device. So rank 0 measures once, in less than about a second, what the configuration leaves open; all ranks take its
answer, which is part of the plan and of its hash. The answer is kept in the user's cache folder, so that runs on one
machine agree with each other; `windlass doctor` shows it. Set muon.ns_method to measure nothing: the results of a run
then depend on its configuration alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from windlass.accelerator.interface import Accelerator, Group
from windlass.accelerator.kernels import REFERENCE
from windlass.accelerator.polar import COEFFICIENTS, Coefficients, Form, gram_flops, plan_restarts, standard_flops
from windlass.config import Config
from windlass.core.exchange import gather_json
from windlass.core.matrices import find_matrices
from windlass.core.muon_plan import shape_key
from windlass.core.specs import ParamSpec, dtype_from_name
from windlass.polar_cache import Record, default_folder, describe_device, read_record, write_record

LEAST_ROWS: Final = 128
"""Smaller matrices take no time that would be worth measuring."""
MOST_RATIO: Final = 2.0
"""Between the operations of two forms: beyond, the one of fewer is faster on any device."""
_MARGIN: Final = 0.9  # of the time of what would be taken unmeasured: less is not noise
_BUDGET: Final = 1.0  # seconds for all measurements of a run
_LONG_ENOUGH: Final = 0.1  # seconds after which a measurement is not repeated
_SAMPLE: Final = (512, 1024)  # rows and columns of the matrix on which dtypes are compared, and how large it may grow
_LARGEST_SAMPLE: Final = 4096
_SAMPLE_SECONDS: Final = 5e-3  # a device that needs less for the sample is not busy with it


@dataclass(frozen=True)
class PolarChoice:
    """What was measured; what is not here is left to the cost model."""

    product_dtype: str | None = None  # "float32" or "bfloat16"; None where it is given, or there is no choice
    forms: Mapping[str, Form] = field(default_factory=dict)  # "rows x columns" -> the faster one


Measure = Callable[[Config, Sequence[ParamSpec]], PolarChoice]


class PolarChooser:
    """One engine's; it gives one answer to one question, even where nothing can be written."""

    def __init__(self, accelerator: Accelerator, group: Group, folder: Path | None = None) -> None:
        self._accelerator = accelerator
        self._group = group
        self._folder = folder or default_folder()
        self._record: Record | None = None

    def choose(self, config: Config, specs: Sequence[ParamSpec]) -> PolarChoice:
        """Rank 0's answer, on every rank. A collective if the configuration leaves something open."""
        shapes = sorted(
            {
                (min(run.rows, run.columns), max(run.rows, run.columns))
                for spec in specs
                if spec.algorithm == "muon"
                for run in find_matrices(spec)
                if min(run.rows, run.columns) >= LEAST_ROWS
            }
        )
        if not shapes or config.muon.ns_method != "auto" or self._accelerator.capabilities.uniform_program:
            return PolarChoice()
        coefficients = COEFFICIENTS[config.muon.coefficients]
        mine = None
        if self._group.rank == 0:
            mine = self._answer(config.muon.ns_dtype, coefficients, shapes)
        dtype, forms = gather_json(self._accelerator, self._group, mine, tag="polar choice")[0]
        return PolarChoice(dtype, forms)

    def _answer(
        self, asked: str, coefficients: Coefficients, shapes: Iterable[tuple[int, int]]
    ) -> tuple[str | None, dict[str, Form]]:
        chosen = self._accelerator.kernels.chosen()
        if REFERENCE in (chosen["polar"], chosen["polar_gram"]):
            return None, {}  # whoever has no kernels of his own has nothing to choose from
        device = describe_device(self._accelerator)
        before = self._record or read_record(self._folder, device)
        record: Record = {"device": device, "products": dict(before["products"]), "forms": dict(before["forms"])}
        clock = _Clock(self._accelerator)
        dtype = None
        if asked == "auto" and "bfloat16" in self._accelerator.capabilities.matmul_dtypes:
            record["products"] = record["products"] or clock.compare_dtypes()
            seconds = record["products"]
            dtype = "float32" if seconds["float32"] < _MARGIN * seconds["bfloat16"] else "bfloat16"
        product = dtype or {"fp16": "float16", "bf16": "bfloat16"}.get(asked, "float32")
        forms: dict[str, Form] = {}
        if product != "bfloat16":  # in which the Gram form is not safe
            for rows, columns in shapes:
                form = _choose_form(record["forms"], clock, rows, columns, coefficients, product)
                forms |= {} if form is None else {shape_key(rows, columns): form, shape_key(columns, rows): form}
        if record != before:
            write_record(self._folder, record)
        self._record = record
        return dtype, forms


def _choose_form(
    known: dict[str, Any], clock: _Clock, rows: int, columns: int, coefficients: Coefficients, product: str
) -> Form | None:
    """The faster form of those matrices, which `known` then has; None where operations decide."""
    restarts = plan_restarts(coefficients, torch.finfo(dtype_from_name(product)).eps)
    standard = standard_flops(rows, columns, len(coefficients))
    gram = gram_flops(rows, columns, coefficients, restarts)
    if not standard / MOST_RATIO <= gram <= standard * MOST_RATIO:
        return None
    expected, other = ("gram", "standard") if gram < standard else ("standard", "gram")
    key = f"{product}, {len(coefficients)} steps, restarts before {restarts}, {shape_key(rows, columns)}"
    if key not in known:
        known[key] = {"form": expected, "standard": None, "gram": None}
        if clock.has_time:
            seconds = {form: clock.time(form, rows, columns, coefficients, product) for form in ("standard", "gram")}
            known[key] |= seconds | {"form": other if seconds[other] < _MARGIN * seconds[expected] else expected}
    form: Form = known[key]["form"]
    return form


class _Clock:
    """Times the kernels `polar` and `polar_gram` of a device, uncounted, until its budget is spent."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._end = time.perf_counter() + _BUDGET

    @property
    def has_time(self) -> bool:
        return time.perf_counter() < self._end

    def compare_dtypes(self) -> dict[str, float]:
        """Seconds for a matrix with products in float32, in the faster form, and in bfloat16."""
        coefficients = COEFFICIENTS["jordan"]
        rows, columns = _SAMPLE
        narrow = self.time("standard", rows, columns, coefficients, "bfloat16")
        while narrow < _SAMPLE_SECONDS and columns < _LARGEST_SAMPLE:
            rows, columns = 2 * rows, 2 * columns
            narrow = self.time("standard", rows, columns, coefficients, "bfloat16")
        wide = min(self.time(form, rows, columns, coefficients, "float32") for form in ("standard", "gram"))
        return {"bfloat16": narrow, "float32": wide}

    def time(self, form: str, rows: int, columns: int, coefficients: Coefficients, product: str) -> float:
        """The shortest of up to three runs, fewer if they take long, after one that may compile."""
        name = "polar" if form == "standard" else "polar_gram"
        kernels = self._accelerator.kernels
        chosen = kernels.chosen()[name]
        run = kernels.bind(next(one for one in kernels.implementations(name) if one.implementation == chosen))
        random = torch.Generator().manual_seed(0)
        dtype = torch.float32 if product == "float32" else torch.bfloat16
        stack = torch.randn(1, rows, columns, generator=random).to(self._accelerator.device, dtype)

        def run_once() -> float:
            begin = time.perf_counter()
            run(stack, coefficients, product_dtype=dtype_from_name(product))
            self._accelerator.streams.synchronize()
            return time.perf_counter() - begin

        run_once()
        seconds = [run_once()]
        while len(seconds) < 3 and sum(seconds) < _LONG_ENOUGH:
            seconds.append(run_once())
        return min(seconds)
