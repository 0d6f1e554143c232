"""The XLA backend, open as the only rank of this process."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

import windlass
from windlass.backends.xla.device import XlaAccelerator


@pytest.fixture(scope="session")
def opened_once() -> Iterator[XlaAccelerator]:
    accelerator = windlass.open_accelerator("xla:0")
    assert isinstance(accelerator, XlaAccelerator)
    yield accelerator
    accelerator.close()


@pytest.fixture
def accelerator(opened_once: XlaAccelerator) -> XlaAccelerator:
    """The device with nothing pending, so that what runs next is the test's own."""
    gc.collect()
    opened_once.streams.synchronize()
    return opened_once
