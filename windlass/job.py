"""Which job this process belongs to, read from what torchrun, Slurm, PBS and MPI leave in the environment."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from windlass.accelerator.environment import DEFAULT_MASTER


class JobError(ValueError):
    """The environment or a hosts file describes no usable job; the message says what to set."""


@dataclass(frozen=True)
class Host:
    """A machine and the ranks it takes."""

    name: str
    slots: int = 1


@dataclass(frozen=True)
class RankPlace:
    """Where one process stands among the ranks that a launcher started."""

    rank: int
    num_ranks: int
    local_rank: int
    local_num_ranks: int
    master_address: str
    master_port: int

    def variables(self) -> dict[str, str]:
        """The same, as torchrun would have said it."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_num_ranks),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }


@dataclass(frozen=True)
class Job:
    """What was found. `place` is set in a process that is a rank already and must not start others; `hosts` are
    machines on which ranks may be started."""

    launcher: str = ""
    place: RankPlace | None = None
    hosts: tuple[Host, ...] = ()


def detect_job(variables: Mapping[str, str]) -> Job:
    """Read the job out of an environment; an empty Job if no launcher has left a mark.

    Raises JobError if a launcher has, and the address of rank 0 or another fact that is needed cannot be told.
    """
    if "RANK" in variables and "WORLD_SIZE" in variables:
        return Job("torchrun", _torchrun(variables))
    if _number(variables, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        local = ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
        return Job("Open MPI", _mpi(variables, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", local))
    tasks = _number(variables, "SLURM_STEP_NUM_TASKS", 1)
    pmi_size = _number(variables, "PMI_SIZE", 1)
    if pmi_size > 1 and pmi_size != tasks:  # mpiexec inside Slurm starts one task of Slurm's for each host
        names = (("MPI_LOCALRANKID", "MPI_LOCALNRANKS"), ("PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"))
        local = next((pair for pair in names if pair[0] in variables), names[0])
        return Job("MPI", _mpi(variables, "PMI_RANK", "PMI_SIZE", local))
    if tasks > 1:
        return Job("Slurm", _slurm_task(variables, tasks))
    if "SLURM_JOB_ID" in variables and (nodes := _slurm_nodes(variables)):
        slots = expand_counts(variables.get("SLURM_TASKS_PER_NODE", "1"))
        return Job("Slurm", hosts=tuple(Host(name, slots[min(i, len(slots) - 1)]) for i, name in enumerate(nodes)))
    if "PBS_NODEFILE" in variables:
        return Job("PBS", hosts=_read_node_file(Path(variables["PBS_NODEFILE"])))
    return Job()


def read_hosts(path: Path) -> tuple[Host, ...]:
    """Read a hosts file: `name slots=N` on each line (`slots=1` if left out), `#` starts a comment."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"hosts file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        match = re.fullmatch(r"slots=([1-9]\d*)", words[1]) if len(words) > 1 else None
        if len(words) > 2 or (len(words) == 2 and match is None):
            raise JobError(f"hosts file {path}, line {number}: got {line.strip()!r}, write it as 'name slots=4'")
        if words[0] in hosts:
            raise JobError(f"hosts file {path}, line {number}: host {words[0]} is named twice, add up its slots")
        hosts[words[0]] = Host(words[0], int(match[1]) if match else 1)
    if not hosts:
        raise JobError(f"hosts file {path} names no host, write a line 'name slots=4' for each")
    return tuple(hosts.values())


def expand_nodes(text: str) -> list[str]:
    """Spell out Slurm's short form of a list of nodes: "a[1-2,07],b" is a1, a2, a07, b."""
    return [name for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text) for name in _expand_name(part)]


def expand_counts(text: str) -> list[int]:
    """Spell out Slurm's tasks per node: "4(x2),3" is 4, 4, 3."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise JobError(f"SLURM_TASKS_PER_NODE is {text!r}, where a list such as '4(x2),3' was expected")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _expand_name(name: str) -> Iterator[str]:
    before, bracket, rest = name.partition("[")
    if not bracket:
        yield name
        return
    inside, _, after = rest.partition("]")
    for item in inside.split(","):
        first, _, last = item.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for tail in _expand_name(after):
                yield f"{before}{number:0{len(first)}d}{tail}"


def _torchrun(variables: Mapping[str, str]) -> RankPlace:
    rank, num_ranks = _number(variables, "RANK"), _number(variables, "WORLD_SIZE")
    local_num_ranks = _number(variables, "LOCAL_WORLD_SIZE", num_ranks)
    return RankPlace(
        rank,
        num_ranks,
        _number(variables, "LOCAL_RANK", rank % local_num_ranks),
        local_num_ranks,
        variables.get("MASTER_ADDR") or DEFAULT_MASTER[0],
        _number(variables, "MASTER_PORT", DEFAULT_MASTER[1]),
    )


def _mpi(variables: Mapping[str, str], rank_name: str, size_name: str, local: tuple[str, str]) -> RankPlace:
    num_ranks = _number(variables, size_name)
    local_num_ranks = _number(variables, local[1])
    address = variables.get("MASTER_ADDR") or ("127.0.0.1" if local_num_ranks == num_ranks else None)
    if address is None:
        nodes = _slurm_nodes(variables)
        if not nodes and "PBS_NODEFILE" in variables:
            nodes = [host.name for host in _read_node_file(Path(variables["PBS_NODEFILE"]))]
        if not nodes:
            raise JobError(
                f"MPI started {num_ranks} ranks on several hosts and none says where rank 0 is: set MASTER_ADDR to its "
                "host on every rank, as in mpirun -x MASTER_ADDR=host"
            )
        address = nodes[0]
    port = _number(variables, "MASTER_PORT", DEFAULT_MASTER[1])
    return RankPlace(
        _number(variables, rank_name), num_ranks, _number(variables, local[0]), local_num_ranks, address, port
    )


def _slurm_task(variables: Mapping[str, str], num_ranks: int) -> RankPlace:
    nodes = _slurm_nodes(variables)
    counts = expand_counts(
        variables.get("SLURM_STEP_TASKS_PER_NODE") or variables.get("SLURM_TASKS_PER_NODE") or str(num_ranks)
    )
    node = _number(variables, "SLURM_NODEID", 0)
    if not nodes and "MASTER_ADDR" not in variables:
        raise JobError("Slurm started this task without SLURM_NODELIST: set MASTER_ADDR to the host of rank 0")
    # One job, one port: two jobs on a node should not meet on the default.
    port = 20000 + _number(variables, "SLURM_JOB_ID", 0) % 10000
    return RankPlace(
        _number(variables, "SLURM_PROCID"),
        num_ranks,
        _number(variables, "SLURM_LOCALID"),
        counts[min(node, len(counts) - 1)],
        variables.get("MASTER_ADDR") or nodes[0],
        _number(variables, "MASTER_PORT", port),
    )


def _slurm_nodes(variables: Mapping[str, str]) -> list[str]:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if variables.get(name):
            return expand_nodes(variables[name])
    return []


def _read_node_file(path: Path) -> tuple[Host, ...]:
    """PBS writes a line for each rank that a host takes."""
    try:
        names = path.read_text().split()
    except OSError as error:
        raise JobError(f"PBS_NODEFILE {path} cannot be read: {error.strerror}") from error
    return tuple(Host(name, names.count(name)) for name in dict.fromkeys(names))


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = variables.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        got = "is not set" if text is None else f"is {text!r}"
        raise JobError(f"{name} {got}, where the launcher should have put a whole number")
    return int(text)
