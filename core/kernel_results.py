"""What kernels return, brought to where the caller keeps it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def keep_results(kept: Iterable[Tensor | None], results: Iterable[Tensor | None]) -> None:
    """Write results into the tensors that are kept. A kernel may return new tensors instead of having written into what
    it consumed; None: there is none."""
    for destination, result in zip(kept, results, strict=True):
        if destination is not None and result is not None and result is not destination:
            destination.copy_(result)
