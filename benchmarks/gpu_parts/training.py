"""Training a GPT of a billion parameters in bf16: plain PyTorch in three precisions, windlass with and without each of
its kernels, DeepSpeed where it is installed. One micro-batch a step, gradients clipped to norm 1, AdamW.

MFU is FLOPs by formula (`gpt.TrainedShape.flops_per_token`) over what the device multiplies at: once as measured in the
same process, once as the datasheet states.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import nn

import windlass
from gpu_parts.context import Context
from gpu_parts.gpt import datasheet_flops, model_shape
from gpu_parts.rows import Row, describe_error
from gpu_parts.systems import (
    Step,
    build,
    configuration,
    engine_step,
    plain_autocast,
    plain_bf16,
    plain_masters,
    windlass_engine,
)

PART: Final = "training"
_KERNELS_OF_A_STEP: Final = ("adamw_many", "adamw", "square_sum", "scale_cast")


def time_step(context: Context, step: Step, warm: int | None = None) -> tuple[float, float]:
    """Seconds of one step, the median of three runs of several, and the last loss."""
    loss = torch.zeros(())
    for _ in range(context.size(3, 1) if warm is None else warm):
        loss = step()
    runs, steps, times = context.size(3, 1), context.size(4, 1), []
    for _ in range(runs):
        begun = context.accelerator.clock()
        for _ in range(steps):
            loss = step()
        times.append((context.accelerator.clock() - begun) / steps)
    return statistics.median(times), float(loss)


def make_row(
    context: Context, by: str, ours: bool, rows: int, measured: tuple[float, float], name: str = "step"
) -> Row:
    """Tokens per second, and the share of the measured rate of products as MFU."""
    seconds, loss = measured
    trained = model_shape(context)
    tokens = rows * trained.shape.sequence_length
    achieved = tokens * trained.flops_per_token / seconds
    datasheet = datasheet_flops(str(context.accelerator.facts.get("model", "")))
    facts = {
        "loss": loss,
        "micro_batch": rows,
        "parameters": trained.shape.num_parameters,
        "flops_per_token": trained.flops_per_token,
        "mfu_datasheet": None if datasheet is None else achieved / datasheet,
    }
    share = achieved / context.matmul_rate(context.product_dtype("bfloat16"))
    case = f"{trained.shape.num_parameters / 1e6:,.0f}M parameters, {rows} x {trained.shape.sequence_length} tokens"
    return Row(PART, name, case, by, ours, seconds, tokens / seconds, "tokens/s", share, context.peak(), facts)


def fit(context: Context, measure: Callable[[int], Iterator[Row]]) -> Iterator[Row]:
    """Measure with the largest micro-batch that fits, halving it from 8 sequences on."""
    sizes = (8, 4, 2, 1) if context.scale == "full" else (2,)
    for rows in sizes:
        try:
            yield from measure(rows)
            return
        except (RuntimeError, windlass.OutOfMemory) as error:
            full = isinstance(error, windlass.OutOfMemory) or "out of memory" in str(error).lower()
            if not full or rows == sizes[-1]:
                raise
        context.release()  # here, where the exception does not hold what was built any more


def _measure_plain(context: Context, by: str, make: Callable[[Context, int], Step]) -> Iterator[Row]:
    def measure(rows: int) -> Iterator[Row]:
        step = make(context, rows)
        yield make_row(context, by, False, rows, time_step(context, step))

    return fit(context, measure)


def _measure_windlass(context: Context, by: str, **options: bool) -> Iterator[Row]:
    def measure(rows: int) -> Iterator[Row]:
        context.accelerator.facts.pop("capture_failed", None)  # of an engine before
        with windlass_engine(context, rows, **options) as engine:
            row = make_row(context, by, True, rows, time_step(context, engine_step(context, engine, rows)))
        failure = context.accelerator.facts.get("capture_failed")
        yield row if failure is None else replace(row, by=f"{by}, but not captured: {failure}")

    return fit(context, measure)


def _measure_without(context: Context) -> Iterator[Row]:
    """One engine, and its kernels replaced by the reference, each alone and then all."""

    def measure(rows: int) -> Iterator[Row]:
        kernels = context.accelerator.kernels
        chosen = kernels.chosen()
        names = [name for name in _KERNELS_OF_A_STEP if chosen.get(name, "reference") != "reference"]
        with windlass_engine(context, rows) as engine:
            step = engine_step(context, engine, rows)
            time_step(context, step)
            for left_out in (*((name,) for name in names), tuple(names)):
                context.release()  # the peak is to be of these steps
                try:
                    for name in left_out:
                        kernels.choose(name, "reference")
                    row = make_row(context, _say_without(left_out), False, rows, time_step(context, step, warm=1))
                    row.facts.pop("loss")  # of more steps than the others'
                    yield row
                finally:
                    for name in left_out:
                        kernels.choose(name, chosen[name])

    return fit(context, measure)


def _say_without(names: Sequence[str]) -> str:
    return "windlass without kernels for " + (", ".join(names) or "any")


def _measure_deepspeed(context: Context) -> Iterator[Row]:
    """DeepSpeed at stage 0 with torch's AdamW: its own would first be compiled, for minutes."""
    if importlib.util.find_spec("deepspeed") is None:
        yield Row(PART, "step", "", "DeepSpeed", error="not installed")
        return
    try:
        deepspeed: Any = importlib.import_module("deepspeed")  # it may have no types where it is

        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"})
        os.environ.setdefault("MASTER_PORT", "29511")
        deepspeed.init_distributed()

        def measure(rows: int) -> Iterator[Row]:
            config = configuration(rows, steps_per_print=10**9)
            config["optimizer"]["params"] |= {"torch_adam": True, "fused": True}
            model: nn.Module = build(context)
            engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
            step = engine_step(context, engine, rows)
            yield make_row(context, "DeepSpeed", False, rows, time_step(context, step))

        yield from fit(context, measure)
    except Exception as error:
        context.require_health(error)
        yield Row(PART, "step", "", "DeepSpeed", error=describe_error(error))


ITEMS = (
    ("windlass", partial(_measure_windlass, by="windlass")),
    ("plain, fp32 masters", partial(_measure_plain, by="torch, bf16 with fp32 masters", make=plain_masters)),
    ("plain, autocast", partial(_measure_plain, by="torch, autocast over fp32", make=plain_autocast)),
    (
        "windlass, all kernels",
        partial(_measure_windlass, by="windlass, norms, loss, captured", capture=True, norms=True, loss=True),
    ),
    ("plain, pure bf16", partial(_measure_plain, by="torch, bf16 without masters", make=plain_bf16)),
    ("windlass, loss", partial(_measure_windlass, by="windlass, linear_cross_entropy", loss=True)),
    ("windlass, norms", partial(_measure_windlass, by="windlass, norms", norms=True)),
    ("windlass, captured", partial(_measure_windlass, by="windlass, capture_update", capture=True)),
    ("windlass, without kernels", _measure_without),
    ("DeepSpeed", _measure_deepspeed),
)
