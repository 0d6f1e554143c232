"""Workers that tests/unit/test_ranks_helper.py runs on ranks."""

from __future__ import annotations

import os
import signal
import time
import warnings

import torch
from torch import distributed


def report_environment() -> dict[str, str]:
    """What torchrun would have set, plus the accelerator and the process's own number."""
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    names += ["OMP_NUM_THREADS", "WINDLASS_ACCELERATOR"]
    return {name: os.environ[name] for name in names} | {"pid": str(os.getpid())}


def read_variable(name: str) -> tuple[str | None, str]:
    return os.environ.get(name), os.getcwd()


def sum_over_ranks(scale: float) -> torch.Tensor:
    """All-reduce of (rank + 1) * scale, in a process group that is left for the pool to destroy."""
    distributed.init_process_group("gloo")
    value = torch.full((3,), (distributed.get_rank() + 1) * scale)
    distributed.all_reduce(value)
    return value


def fail_on_rank(failing: int) -> int:
    rank = int(os.environ["RANK"])
    if rank == failing:
        raise ArithmeticError(f"rank {rank} cannot go on")
    return rank


def fail_while_others_wait(failing: int) -> None:
    """One rank raises; the others sleep far past any grace."""
    fail_on_rank(failing)
    time.sleep(600)


def kill_rank(killed: int) -> str:
    if int(os.environ["RANK"]) == killed:
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


def sleep_forever() -> None:
    time.sleep(600)


def warn() -> None:
    warnings.warn("nobody should miss this", UserWarning, stacklevel=1)


def return_unpicklable() -> object:
    return lambda: None
