"""The batch triangle: samples per step = samples per rank and micro-batch x micro-batches x data-parallel ranks."""

from __future__ import annotations

from typing import NamedTuple

_TRAIN, _MICRO, _STEPS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


class BatchSizes(NamedTuple):
    """Three sizes that agree for a number of ranks."""

    train: int  # samples per optimizer step, over all ranks
    micro: int  # samples per rank in one forward and backward
    steps: int  # micro-batches per optimizer step


def resolve_batch_sizes(
    train: int | None, micro: int | None, steps: int | None, num_ranks: int, default_micro: int | None = None
) -> BatchSizes:
    """Derive what is not given: any two sizes give the third, fewer leave accumulation at 1 and `micro` at its default.

    All sizes are positive. Raises ValueError, with the arithmetic, if the sizes contradict each other or do not divide.
    """
    if train is None:
        micro = micro or default_micro or 1
        steps = steps or 1
        return BatchSizes(micro * steps * num_ranks, micro, steps)
    if micro is not None and steps is not None:
        return _checked(train, micro, steps, num_ranks)
    if micro is not None:
        return BatchSizes(train, micro, _divide(train, micro, _MICRO, num_ranks))
    if steps is not None:
        return BatchSizes(train, _divide(train, steps, _STEPS, num_ranks), steps)
    return BatchSizes(train, _divide(train, 1, None, num_ranks), 1)


def _checked(train: int, micro: int, steps: int, num_ranks: int) -> BatchSizes:
    product = micro * steps * num_ranks
    if product != train:
        raise ValueError(
            f"{_TRAIN} = {train} contradicts {_MICRO} x {_STEPS} x ranks = "
            f"{micro} x {steps} x {num_ranks} = {product}, set {_TRAIN} to {product} or remove one of the three keys"
        )
    return BatchSizes(train, micro, steps)


def _divide(train: int, factor: int, name: str | None, num_ranks: int) -> int:
    """Split a step's samples over `factor` and the ranks, or say which totals would split."""
    divisor = factor * num_ranks
    quotient, rest = divmod(train, divisor)
    if not rest:
        return quotient
    lower, upper = quotient * divisor, (quotient + 1) * divisor
    by = f"{name} x ranks = {factor} x {num_ranks} = {divisor}" if name else f"the number of ranks = {num_ranks}"
    totals = f"{lower} or {upper}" if lower else str(upper)
    change = f", or change {name}" if name else ", or change the number of ranks"
    raise ValueError(f"{_TRAIN} = {train} does not divide by {by}, set it to {totals}{change}")
