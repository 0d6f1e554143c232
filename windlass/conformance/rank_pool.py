"""Run one function on several ranks, as real processes that are kept from test to test.

Importing torch takes seconds, so rank processes are started once per pytest session and serve call after call. Each
call has its own rendezvous port and environment; its process group is destroyed afterwards. A rank that failed,
died or hung is never used again. Workers live in modules that a new process can import: files beside this one.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import random
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from windlass.conformance.foreign_warnings import describe_warning

_START_SECONDS = 60.0  # a new process imports torch; on a busy machine that alone takes a while


class RanksFailed(Exception):
    """Some ranks raised, died or gave no answer in time; the message carries each one's traceback.

    `failures` maps a rank to what it met, in the order in which it was met. `results` maps a rank that did answer to
    its result.
    """

    def __init__(self, title: str, failures: dict[int, str], results: dict[int, Any]) -> None:
        texts = (f"--- rank {rank}\n{text.rstrip()}" for rank, text in failures.items())
        super().__init__("\n".join([title, *texts]))
        self.failures = failures
        self.results = results


@dataclass(frozen=True)
class _Call:
    """One rank's part of a call, as sent to its process."""

    worker: str  # "module:function"
    arguments: bytes  # pickled, so that what cannot be unpickled there is a failure of that rank
    environment: dict[str, str]
    folder: str
    timeout: float  # seconds; the rank prints where it hangs when they have passed
    foreign: str  # pattern of the modules whose warnings are noted and no errors; none if it is empty


@dataclass(frozen=True)
class _Answer:
    failure: str | None  # the traceback
    result: bytes = b""  # pickled here, so that a result that cannot be pickled is a failure of its rank
    noted: tuple[str, ...] = ()  # warnings


@dataclass
class _Rank:
    process: BaseProcess
    connection: Connection

    def wait_until_ready(self) -> None:
        if not self.connection.poll(_START_SECONDS):
            raise TimeoutError(f"a rank process did not start within {_START_SECONDS:g} s.")
        self.connection.recv_bytes()

    def is_alive(self) -> bool:
        return self.process.is_alive() and not self.connection.closed

    def stop(self) -> None:
        """End the process at once; nothing of it is left when this returns."""
        self.process.kill()
        self.process.join()
        self.connection.close()


@dataclass
class _Pool:
    ranks: list[_Rank] = field(default_factory=list)

    def take(self, num_ranks: int) -> list[_Rank]:
        """`num_ranks` living processes, started side by side where there are not enough."""
        for rank in [rank for rank in self.ranks if not rank.is_alive()]:
            rank.stop()
            self.ranks.remove(rank)
        started = [_start_rank() for _ in range(num_ranks - len(self.ranks))]
        self.ranks += started
        try:
            for rank in started:
                rank.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self.ranks[:num_ranks]

    def stop(self) -> None:
        while self.ranks:
            self.ranks.pop().stop()


_pool = _Pool()


def stop_pool() -> None:
    """End all kept rank processes; the next call starts new ones."""
    _pool.stop()


atexit.register(stop_pool)


def run_ranks(
    worker: Callable[..., Any],
    num_ranks: int,
    *args: Any,
    timeout: float = 120.0,  # seconds, for the whole call; starting processes is not counted
    grace: float = 5.0,  # seconds that the other ranks get to answer once one has failed
    accelerator: str = "cpu",
    fresh: bool = False,
    foreign: str = "",
    note_warning: Callable[[str], None] | None = None,
) -> list[Any]:
    """Call `worker(*args)` on every rank and return the results by rank.

    The worker finds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT set as torchrun sets
    them, and this process's own environment and folder otherwise. Warnings are errors in it, but those of modules
    whose name matches the pattern `foreign` are given to `note_warning` instead. `fresh` starts new processes and ends
    them afterwards: for workers that kill ranks or leave threads behind.

    Raises `RanksFailed` if a rank raises, dies, or has not answered in time.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks must be at least 1, got {num_ranks}.")
    name = _import_path(worker)
    pool = _Pool() if fresh else _pool
    ranks = pool.take(num_ranks)
    try:
        port = _free_port()
        arguments = pickle.dumps(args)
        for index, rank in enumerate(ranks):
            environment = _environment(index, num_ranks, port, accelerator)
            call = _Call(name, arguments, environment, os.getcwd(), timeout, foreign)
            rank.connection.send_bytes(pickle.dumps(call))
        return _collect(name, ranks, timeout, grace, note_warning)
    except BaseException:
        for rank in ranks:  # they may be in the middle of anything
            rank.stop()
        raise
    finally:
        if fresh:
            pool.stop()


def _collect(
    name: str,
    ranks: Sequence[_Rank],
    timeout: float,
    grace: float,
    note_warning: Callable[[str], None] | None,
) -> list[Any]:
    waiting = {rank.connection: index for index, rank in enumerate(ranks)}
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while waiting and (left := deadline - time.monotonic()) > 0:
        for connection in wait(list(waiting), left):
            assert isinstance(connection, Connection)
            index = waiting.pop(connection)
            try:
                answer = pickle.loads(connection.recv_bytes())
            except (EOFError, ConnectionResetError):
                ranks[index].process.join()
                answer = _Answer(
                    f"The process ended with exit code {ranks[index].process.exitcode}, without an answer."
                )
            assert isinstance(answer, _Answer)
            if note_warning is not None:
                for text in answer.noted:
                    note_warning(text)
            if answer.failure is None:
                results[index] = pickle.loads(answer.result)
            else:
                deadline = min(deadline, time.monotonic() + grace)
                failures[index] = answer.failure
    if waiting and not failures:
        title = f"{name} gave no answer within {timeout:g} s on ranks {sorted(waiting.values())} of {len(ranks)}."
        raise RanksFailed(title, dict.fromkeys(sorted(waiting.values()), "No answer; killed."), results)
    if failures:
        title = f"{name} failed on ranks {list(failures)} of {len(ranks)}, rank {next(iter(failures))} first."
        failures.update(dict.fromkeys(sorted(waiting.values()), "No answer after another rank had failed; killed."))
        raise RanksFailed(title, failures, results)
    return [results[index] for index in range(len(ranks))]


def _environment(index: int, num_ranks: int, port: int, accelerator: str) -> dict[str, str]:
    return {
        **os.environ,
        "RANK": str(index),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(index),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "WINDLASS_ACCELERATOR": accelerator,
    }


def _import_path(worker: Callable[..., Any]) -> str:
    """`module:function`, once we know that a new process will find the same function there."""
    path = f"{worker.__module__}:{worker.__qualname__}"
    at_top = getattr(sys.modules[worker.__module__], worker.__qualname__, None) is worker
    package = worker.__module__.partition(".")[0]  # pytest names test files as if the repository were on the path
    if not at_top or not any(finder.find_spec(package, None) for finder in sys.meta_path):
        raise ValueError(f"a rank process cannot import {path}: put the worker at the top of a module under tests/.")
    return path


def _free_port() -> int:
    """A port that nobody listens on, below the range that the system hands out to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _start_rank() -> _Rank:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Rank(process, ours)


# What follows runs in the rank's process.


def _serve(connection: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is first imported
    importlib.import_module("torch.distributed")
    connection.send_bytes(b"ready")
    with contextlib.suppress(EOFError):  # the parent has closed its end
        while True:
            call = pickle.loads(connection.recv_bytes())
            assert isinstance(call, _Call)
            connection.send_bytes(pickle.dumps(_answer(call)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # a rank that hangs in a collective would outlive a killed test run


def _answer(call: _Call) -> _Answer:
    import torch

    os.environ.clear()
    os.environ.update(call.environment)
    os.chdir(call.folder)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(call.timeout, file=2)  # sys.stderr's descriptor, whoever replaced the object
    noted: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("error")
            if call.foreign:
                warnings.filterwarnings("always", module=call.foreign)
            module, _, function = call.worker.partition(":")
            result = getattr(importlib.import_module(module), function)(*pickle.loads(call.arguments))
            return _Answer(None, pickle.dumps(result), tuple(map(describe_warning, noted)))
    except BaseException:  # SystemExit too: the parent wants an answer
        return _Answer(traceback.format_exc(), noted=tuple(map(describe_warning, noted)))
    finally:
        faulthandler.cancel_dump_traceback_later()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
