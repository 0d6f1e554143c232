"""Start ranks and answer for them: one sentence when one fails, and nothing left running. torchrun does the work."""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from windlass.accelerator.environment import DEFAULT_MASTER
from windlass.accelerator.errors import WindlassError
from windlass.job import Host

ERROR_FILE: Final = "TORCHELASTIC_ERROR_FILE"
"""Set by torchrun in each rank: where it writes what went wrong."""

_FORWARDED = ("WINDLASS_", "PYTHONPATH", "OMP_NUM_THREADS")
_GRACE_SECONDS = 30  # for ranks to save and end when the launcher is told to stop
_CONSEQUENCES = ("PeerLost", "CollectiveTimeout")  # what a rank meets when another one has failed


class RanksFailed(WindlassError):
    """Ranks that were started did not all end well: the first cause, and which rank it was."""


class Interrupted(WindlassError):
    """The run was told to stop, and did so between two steps."""


@dataclass(frozen=True)
class RankFailure:
    """How one rank ended. A negative exit code is the signal that killed it, as in `subprocess`."""

    rank: int
    exit_code: int
    time: float  # when it was noticed, or when the rank itself wrote it down; seconds
    kind: str = ""  # name of the error's class, from the rank's error file
    message: str = ""


def start_ranks(command: Sequence[str], num_ranks: int) -> None:
    """Run `command` as `num_ranks` processes on this host and wait for them.

    Raises RanksFailed if one fails or if this process is told to stop; the others have been ended by then.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="windlass-") as folder, _silent_logging():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        if hasattr(config, "shutdown_timeout"):  # from torch 2.10 on; before that it is 30 seconds
            config.shutdown_timeout = _GRACE_SECONDS
        try:
            elastic_launch(config, command[0])(*command[1:])
        except ChildFailedError as error:
            failures = [_read_failure(rank, failure) for rank, failure in error.failures.items()]
            raise RanksFailed(describe_failures(failures, num_ranks)) from error
        except SignalException as error:
            saved = [_read_error_file(path) for path in sorted(Path(folder).rglob("error.json"))]
            stopped = next((one["message"] for one in saved if one.get("kind") == Interrupted.__name__), None)
            raise RanksFailed(stopped or f"stopped by {error.sigval.name}; all ranks have ended") from error


def describe_failures(failures: Sequence[RankFailure], num_ranks: int) -> str:
    """Name the rank that failed first and what it said; the others failed because of it."""
    first = min(one.time for one in failures)

    def order(failure: RankFailure) -> tuple[int, float, int]:
        if failure.kind:
            blame = 2 if failure.kind in _CONSEQUENCES else 1
        elif failure.exit_code >= 0:
            blame = 1
        else:  # the launcher ends the rest with SIGTERM at once, and with SIGKILL much later
            ours = failure.exit_code == -signal.SIGTERM or failure.time > first + _GRACE_SECONDS / 2
            blame = 3 if ours else 0
        return blame, failure.time, failure.rank

    cause = min(failures, key=order)
    if cause.kind == Interrupted.__name__:
        return cause.message
    who = f"rank {cause.rank} of {num_ranks}"
    if cause.kind:
        return cause.message if cause.message.startswith("rank ") else f"{who}: {cause.message}"
    if cause.exit_code < 0:
        name = signal.Signals(-cause.exit_code).name
        hint = ", by hand or because memory ran out" if name == "SIGKILL" else ""
        return f"{who} was killed by {name}{hint}; the other ranks were ended"
    return f"{who} ended with exit code {cause.exit_code}, what it printed is above; the other ranks were ended"


def report_error(error: BaseException) -> None:
    """In a rank: leave one sentence for the launcher to print, or print it where nobody would read the file."""
    if os.environ.get("WINDLASS_DEBUG") == "1":
        traceback.print_exception(error)
    message = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, WindlassError | ValueError):  # a bug, or a library's error: its class is half of it
        message = f"{type(error).__name__}: {message}; WINDLASS_DEBUG=1 shows where"
    path = os.environ.get(ERROR_FILE)
    if path is None:
        alone = os.environ.get("WORLD_SIZE", "1") == "1" or isinstance(error, Interrupted)
        rank = "" if alone else f"rank {os.environ.get('RANK', '0')}: "
        print(f"windlass: {rank}{message}", file=sys.stderr)
        return
    content = {"message": message, "kind": type(error).__name__, "timestamp": time.time()}
    Path(path).write_text(json.dumps(content))


def end_with_parent() -> None:
    """In a rank: be killed when the launcher dies, even by SIGKILL, which it cannot pass on (Linux)."""
    parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
    with contextlib.suppress(OSError, AttributeError):  # a C library without prctl
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


def set_threads(num_ranks: int, variables: Mapping[str, str]) -> str | None:
    """Share this host's cores among its ranks by OMP_NUM_THREADS, unless the user has set it; the line that says so."""
    if num_ranks == 1 or variables.get("OMP_NUM_THREADS"):
        return None
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // num_ranks)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return f"OMP_NUM_THREADS={threads}: {cores} cores for {num_ranks} ranks; set it yourself to change that"


def host_commands(
    hosts: Sequence[Host],
    command: Sequence[str],  # the script and its arguments
    *,
    folder: str,  # the working folder, the same path on every host
    variables: Mapping[str, str],
    python: str = sys.executable,
    here: str = "",  # the name of this host: its command needs no ssh
) -> list[list[str]]:
    """The command that starts each host's ranks, to be run from this host; rank 0 is on the first."""
    exported = [f"{name}={variables[name]}" for name in sorted(variables) if name.startswith(_FORWARDED)]
    port = variables.get("MASTER_PORT", str(DEFAULT_MASTER[1]))
    commands = []
    for index, host in enumerate(hosts):
        torchrun = [python, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}", f"--node-rank={index}"]
        torchrun += [f"--nproc-per-node={host.slots}", f"--master-addr={hosts[0].name}", f"--master-port={port}"]
        torchrun += ["--max-restarts=0", *command]
        if host.name in ("localhost", here):
            commands.append(torchrun)
        else:  # with a terminal (-tt), the far side is hung up when this end goes
            remote = f"cd {shlex.quote(folder)} && exec {shlex.join(['env', *exported, *torchrun])}"
            commands.append(["ssh", "-tt", "-o", "BatchMode=yes", host.name, remote])
    return commands


def slurm_command(hosts: Sequence[Host], command: Sequence[str], *, python: str = sys.executable) -> list[str]:
    """The srun that starts every rank of an allocation; each finds its place from what Slurm tells it."""
    tasks = sum(host.slots for host in hosts)
    windlass = [python, "-m", "windlass.cli", "run", *command]
    return ["srun", f"--nodes={len(hosts)}", f"--ntasks={tasks}", "--kill-on-bad-exit=1", *windlass]


def run_on_hosts(names: Sequence[str], commands: Sequence[Sequence[str]]) -> None:
    """Run one command for each name until all have ended; when one fails, end the others and raise RanksFailed."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in zip(names, commands, strict=True):
            try:
                running[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            except OSError as error:
                raise RanksFailed(f"{name}: {command[0]} does not start, {error.strerror}") from error
        while running:
            for name, process in list(running.items()):
                status = process.poll()
                if status:
                    raise RanksFailed(f"{name}: {commands[0][0]} ended with exit code {status}, see what it printed")
                if status == 0:
                    del running[name]
            time.sleep(0.1)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)
            process.kill()


def this_host() -> str:
    """The name by which hosts files know this machine."""
    return socket.gethostname()


def _read_failure(rank: int, failure: Any) -> RankFailure:
    """`failure` is torchrun's ProcessFailure."""
    saved = _read_error_file(Path(failure.error_file))
    return RankFailure(
        rank,
        failure.exitcode,
        float(saved.get("timestamp", failure.timestamp)),
        str(saved.get("kind", "")),
        str(saved.get("message", "")),
    )


def _read_error_file(path: Path) -> dict[str, Any]:
    """What `report_error` wrote; nothing if the rank wrote none, or if its script uses torchrun's own form."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and isinstance(content.get("message"), str):
            return content
    return {}


@contextlib.contextmanager
def _silent_logging() -> Iterator[None]:
    """torchrun's library logs each failure several times, with a traceback; the exception says it once."""
    if os.environ.get("WINDLASS_DEBUG") == "1":
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
