"""The GPU of these tests. Where there is none they fail, for a test that did not run has shown nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

import windlass
from windlass.backends.cuda.device import CudaAccelerator
from windlass.backends.cuda.probe import probe_devices


@pytest.fixture(scope="session")
def opened() -> Iterator[CudaAccelerator]:
    """The first GPU, opened once."""
    found = probe_devices()
    if not found.usable:
        pytest.fail(f"tests/cuda need a GPU: {found.reason}", pytrace=False)
    with contextlib.closing(windlass.open_accelerator("cuda:0")) as accelerator:
        assert isinstance(accelerator, CudaAccelerator)
        yield accelerator


@pytest.fixture
def accelerator(opened: CudaAccelerator) -> Iterator[CudaAccelerator]:
    """The GPU, idle before and after each test, with fresh counters."""
    opened.streams.synchronize()
    opened.counters.reset()
    yield opened
    opened.streams.synchronize()


@pytest.fixture(autouse=True)
def _need_a_gpu(accelerator: CudaAccelerator) -> None:
    """Every test here needs it, also one that does not name it."""
