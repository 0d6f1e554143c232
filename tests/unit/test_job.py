"""Launch facts from fake environments, hosts files, and the commands that follow from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from windlass.job import Host, Job, JobError, RankPlace, detect_job, expand_counts, expand_nodes, read_hosts
from windlass.launch import RankFailure, describe_failures, host_commands, set_threads, slurm_command

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "6",
    "SLURM_TASKS_PER_NODE": "4,2",
}
SLURM_TASK = {
    **SLURM,
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "4,2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
PALS = {"PMI_RANK": "2", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "0", "PMI_LOCAL_SIZE": "2"}


@pytest.mark.parametrize(
    ("variables", "launcher", "place"),
    [
        ({}, "", None),
        ({"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf"}, "", None),
        (TORCHRUN, "torchrun", RankPlace(3, 4, 1, 2, "a", 29500)),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun", RankPlace(0, 2, 0, 2, "127.0.0.1", 29500)),
        ({**SLURM_TASK, **TORCHRUN}, "torchrun", RankPlace(3, 4, 1, 2, "a", 29500)),
        (SLURM_TASK, "Slurm", RankPlace(5, 6, 1, 2, "n1", 23456)),
        ({**SLURM_TASK, "MASTER_ADDR": "x", "MASTER_PORT": "4"}, "Slurm", RankPlace(5, 6, 1, 2, "x", 4)),
        ({**SLURM_TASK, "PMI_SIZE": "6", "PMI_RANK": "5"}, "Slurm", RankPlace(5, 6, 1, 2, "n1", 23456)),
        (OPEN_MPI, "Open MPI", RankPlace(1, 2, 1, 2, "127.0.0.1", 29500)),
        # mpirun inside Slurm: its daemons are tasks of Slurm's, one for each node
        ({**SLURM_TASK, **OPEN_MPI}, "Open MPI", RankPlace(1, 2, 1, 2, "127.0.0.1", 29500)),
        ({**SLURM_TASK, **HYDRA, "SLURM_STEP_NUM_TASKS": "2"}, "MPI", RankPlace(2, 4, 0, 2, "n1", 29500)),
        ({**HYDRA, "MASTER_ADDR": "x"}, "MPI", RankPlace(2, 4, 0, 2, "x", 29500)),
        ({**PALS, "MASTER_ADDR": "x"}, "MPI", RankPlace(2, 4, 0, 2, "x", 29500)),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, "", None),
    ],
)
def test_place_of_a_rank(variables: dict[str, str], launcher: str, place: RankPlace | None) -> None:
    assert detect_job(variables) == Job(launcher, place)


def test_an_allocation_gives_hosts_and_no_place(tmp_path: Path) -> None:
    two = (Host("n1", 4), Host("n2", 2))
    assert detect_job({**SLURM, "SLURM_PROCID": "0"}) == Job("Slurm", hosts=two)  # the batch script itself
    (tmp_path / "nodes").write_text("n1\nn1\nn2\nn1\nn2\nn1\n")
    assert detect_job({"PBS_NODEFILE": str(tmp_path / "nodes")}) == Job("PBS", hosts=two)


def test_mpi_over_hosts_takes_the_first_of_pbs(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text("first\nsecond\n")
    place = detect_job({**HYDRA, "PBS_NODEFILE": str(tmp_path / "nodes")}).place
    assert place is not None
    assert place.master_address == "first"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (HYDRA, "none says where rank 0 is: set MASTER_ADDR"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', where the launcher should have put a whole number"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_LOCAL_SIZE is not set"),
        ({**SLURM_TASK, "SLURM_STEP_TASKS_PER_NODE": "four"}, "SLURM_TASKS_PER_NODE is 'four'"),
        ({"PBS_NODEFILE": "/nowhere/nodes"}, "PBS_NODEFILE /nowhere/nodes cannot be read: No such file"),
    ],
)
def test_half_a_job_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(JobError, match=message):
        detect_job(variables)


def test_place_is_said_as_torchrun_says_it() -> None:
    assert detect_job(detect_job(SLURM_TASK).place.variables()).place == detect_job(SLURM_TASK).place  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,12],login", ["n08", "n09", "n10", "n12", "login"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("n[1,3]-ib", ["n1-ib", "n3-ib"]),
    ],
)
def test_node_lists_are_spelled_out(text: str, names: list[str]) -> None:
    assert expand_nodes(text) == names


def test_counts_are_spelled_out() -> None:
    assert expand_counts("4(x3),2,1(x2)") == [4, 4, 4, 2, 1, 1]


def test_hosts_file(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# two machines\n\nalpha slots=4  # fast\nbeta\n")
    assert read_hosts(path) == (Host("alpha", 4), Host("beta", 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a slots=2\nb\na slots=2\n", "line 3: host a is named twice, add up its slots"),
        ("a slots=many\n", "line 1: got 'a slots=many', write it as 'name slots=4'"),
        ("a slots=0\n", "line 1: got 'a slots=0'"),
        ("a slots=1 more\n", "line 1: got 'a slots=1 more'"),
        ("# none\n", "names no host"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_bad_hosts_file_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "hosts"
    if content is not None:
        path.write_text(content)
    with pytest.raises(JobError, match=message):
        read_hosts(path)


def test_commands_for_hosts() -> None:
    commands = host_commands(
        (Host("alpha", 4), Host("beta", 2)),
        ["train.py", "--name", "a run"],
        folder="/data/my run",
        variables={"WINDLASS_ACCELERATOR": "cpu", "HOME": "/root", "OMP_NUM_THREADS": "3", "MASTER_PORT": "1234"},
        python="/env/bin/python",
        here="alpha",
    )
    assert commands[0] == [
        *("/env/bin/python", "-m", "torch.distributed.run", "--nnodes=2", "--node-rank=0", "--nproc-per-node=4"),
        *("--master-addr=alpha", "--master-port=1234", "--max-restarts=0", "train.py", "--name", "a run"),
    ]
    assert commands[1] == [
        *("ssh", "-tt", "-o", "BatchMode=yes", "beta"),
        "cd '/data/my run' && exec env OMP_NUM_THREADS=3 WINDLASS_ACCELERATOR=cpu /env/bin/python -m "
        "torch.distributed.run --nnodes=2 --node-rank=1 --nproc-per-node=2 --master-addr=alpha --master-port=1234 "
        "--max-restarts=0 train.py --name 'a run'",
    ]


def test_command_for_slurm() -> None:
    command = slurm_command((Host("n1", 4), Host("n2", 2)), ["train.py", "-x"], python="/env/bin/python")
    assert command == [
        *("srun", "--nodes=2", "--ntasks=6", "--kill-on-bad-exit=1"),
        *("/env/bin/python", "-m", "windlass.cli", "run", "train.py", "-x"),
    ]


@pytest.mark.parametrize(
    ("failures", "told"),
    [
        ([RankFailure(1, -9, 10)], "rank 1 of 4 was killed by SIGKILL, by hand or because memory ran out; the other"),
        # the peers of a killed rank notice before the launcher does
        ([RankFailure(0, 1, 9.5, "PeerLost", "rank 1 died"), RankFailure(1, -9, 10)], "rank 1 of 4 was killed by SIG"),
        # a stopped rank is killed by the launcher long after another has given up on it
        ([RankFailure(0, 1, 10, "CollectiveTimeout", "rank 1 did not come"), RankFailure(1, -9, 40)], "rank 1 did not"),
        ([RankFailure(2, -15, 10), RankFailure(3, 1, 10, "OutOfMemory", "no room")], "rank 3 of 4: no room"),
        ([RankFailure(0, 1, 10, "PeerLost", "gone"), RankFailure(3, 1, 11, "OutOfMemory", "full")], "rank 3 of 4: ful"),
        ([RankFailure(2, 3, 10), RankFailure(1, -15, 10)], "rank 2 of 4 ended with exit code 3, what it printed is"),
        ([RankFailure(1, 1, 10, "Interrupted", "stopped after step 3")], "stopped after step 3"),
        ([RankFailure(0, -15, 10), RankFailure(1, -15, 10)], "rank 0 of 4 was killed by SIGTERM; the other"),
    ],
)
def test_the_first_cause_is_told(failures: list[RankFailure], told: str) -> None:
    assert describe_failures(failures, 4).startswith(told)
    assert describe_failures(failures[::-1], 4).startswith(told)


def test_cores_are_shared_unless_the_user_said_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert set_threads(2, {"OMP_NUM_THREADS": "5"}) is None
    assert set_threads(1, {}) is None
    line = set_threads(3, {})
    assert line == "OMP_NUM_THREADS=2: 8 cores for 3 ranks; set it yourself to change that"
