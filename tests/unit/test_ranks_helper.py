"""The rank pool runs workers on real processes, tells failures apart and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import rank_workers
from windlass.conformance.rank_pool import RanksFailed, run_ranks


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that ended and was not waited for yet still has a number.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_ranks_see_what_torchrun_would_set() -> None:
    reports = run_ranks(rank_workers.report_environment, 2)
    assert [report["RANK"] for report in reports] == ["0", "1"]
    assert [report["LOCAL_RANK"] for report in reports] == ["0", "1"]
    assert {report["WORLD_SIZE"] for report in reports} == {"2"}
    assert {report["LOCAL_WORLD_SIZE"] for report in reports} == {"2"}
    assert {report["MASTER_ADDR"] for report in reports} == {"127.0.0.1"}
    assert {report["OMP_NUM_THREADS"] for report in reports} == {"1"}
    assert {report["WINDLASS_ACCELERATOR"] for report in reports} == {"cpu"}
    assert len({report["MASTER_PORT"] for report in reports}) == 1
    assert len({report["pid"] for report in reports} | {str(os.getpid())}) == 3


def test_calls_reuse_processes_on_new_ports() -> None:
    first = run_ranks(rank_workers.report_environment, 2)
    second = run_ranks(rank_workers.report_environment, 2, accelerator="sim")
    assert [report["pid"] for report in first] == [report["pid"] for report in second]
    assert first[0]["MASTER_PORT"] != second[0]["MASTER_PORT"]
    assert second[1]["WINDLASS_ACCELERATOR"] == "sim"


def test_fresh_ranks_are_new_and_end_with_the_call() -> None:
    kept = run_ranks(rank_workers.report_environment, 2)
    fresh = run_ranks(rank_workers.report_environment, 2, fresh=True)
    assert {report["pid"] for report in kept}.isdisjoint(report["pid"] for report in fresh)
    assert not any(is_running(int(report["pid"])) for report in fresh)
    assert all(is_running(int(report["pid"])) for report in kept)


def test_a_process_group_left_open_does_not_reach_the_next_call() -> None:
    for num_ranks, scale in ((2, 1.0), (2, 2.0), (1, 5.0)):
        expected = torch.full((3,), scale * num_ranks * (num_ranks + 1) / 2)
        for value in run_ranks(rank_workers.sum_over_ranks, num_ranks, scale):
            torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_ranks_follow_environment_and_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK_POOL_PROBE", "here")
    monkeypatch.chdir(tmp_path)
    assert run_ranks(rank_workers.read_variable, 2, "RANK_POOL_PROBE") == [("here", str(tmp_path))] * 2
    monkeypatch.undo()
    assert run_ranks(rank_workers.read_variable, 2, "RANK_POOL_PROBE") == [(None, os.getcwd())] * 2


def test_a_failure_carries_its_traceback_and_the_results_of_the_others() -> None:
    with pytest.raises(RanksFailed, match="fail_on_rank failed on ranks \\[1\\] of 2") as caught:
        run_ranks(rank_workers.fail_on_rank, 2, 1)
    assert "ArithmeticError: rank 1 cannot go on" in caught.value.failures[1]
    assert "in fail_on_rank" in str(caught.value)
    assert caught.value.results == {0: 0}


def test_a_failure_ends_ranks_that_wait_for_it() -> None:
    pids = [int(report["pid"]) for report in run_ranks(rank_workers.report_environment, 2)]
    start = time.monotonic()
    with pytest.raises(RanksFailed, match="rank 0 first") as caught:
        run_ranks(rank_workers.fail_while_others_wait, 2, 0, grace=0.2)
    assert time.monotonic() - start < 30
    assert list(caught.value.failures) == [0, 1]
    assert not any(is_running(pid) for pid in pids)


def test_a_killed_rank_is_reported_beside_the_survivors() -> None:
    with pytest.raises(RanksFailed, match="exit code -9") as caught:
        run_ranks(rank_workers.kill_rank, 2, 1, fresh=True)
    assert caught.value.results == {0: "survived"}


def test_a_hanging_rank_is_killed_in_time() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=r"no answer within 0.5 s on ranks \[0\] of 1"):
        run_ranks(rank_workers.sleep_forever, 1, timeout=0.5)
    assert time.monotonic() - start < 60


def test_warnings_are_errors_on_ranks() -> None:
    with pytest.raises(RanksFailed, match="UserWarning: nobody should miss this"):
        run_ranks(rank_workers.warn, 1)


def test_an_unpicklable_result_is_a_failure_of_its_rank() -> None:
    with pytest.raises(RanksFailed, match="return_unpicklable failed on ranks \\[0\\] of 1"):
        run_ranks(rank_workers.return_unpicklable, 1)


def test_workers_that_a_process_cannot_import_are_refused() -> None:
    with pytest.raises(ValueError, match="put the worker at the top of a module"):
        run_ranks(lambda: None, 1)
    with pytest.raises(ValueError, match="num_ranks must be at least 1"):
        run_ranks(rank_workers.warn, 0)


def test_ranks_end_when_the_test_run_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(rank_workers.__file__).parent)!r})\n"
        "if __name__ == '__main__':\n"
        "    import rank_workers\n"
        "    from windlass.conformance import rank_pool\n"
        "    for report in rank_pool.run_ranks(rank_workers.report_environment, 1):\n"
        "        print(report['pid'], flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, check=False)
    assert run.returncode == -signal.SIGKILL
    pid = int(run.stdout)
    deadline = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)
