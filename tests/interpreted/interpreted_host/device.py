"""The generic device over the host's processor, with Triton's kernels interpreted."""

import functools
import os
import sys
from dataclasses import replace

import numpy

from windlass.accelerator.errors import BackendUnusable
from windlass.backends.generic.device import open_device


def open_interpreted(index):
    """Open the host. Every rank of a job opens the same index 0."""
    from_the_start = os.environ.get("TRITON_INTERPRET") == "1"
    if "triton" in sys.modules and not from_the_start:
        raise BackendUnusable(
            f"interpreted:{index} cannot be opened: triton was imported in this process before, and compiles; set "
            "TRITON_INTERPRET=1 before the process starts"
        )
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is declared, its own included
    from windlass.backends.triton.kernels import triton_kernels

    kernels = [replace(kernel, function=quiet(kernel.function)) for kernel in triton_kernels()]
    return open_device("cpu", index, name="interpreted", shared_device=True, kernels=kernels)


def quiet(function):
    """The function without numpy's warnings of infinite and undefined results: the interpreter computes with numpy,
    and what a GPU does silently is what the suite tests."""

    @functools.wraps(function)
    def call(*arguments, **named):
        with numpy.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return function(*arguments, **named)

    return call
