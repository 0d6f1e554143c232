"""The commands as users type them: what they print, what they leave behind, how they end when something is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cli_runs import finish, is_alive, metrics, ranks_of, running, wait_until, windlass
from windlass import cli

ROOT = Path(__file__).resolve().parents[2]

Main = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Main:
    """The command in this process, in an empty folder, for what ends before a rank is started: its exit code, what it
    printed, and the lines of stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_train", lambda *_: pytest.fail("ranks would have been started"))

    def call(*arguments: object) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["windlass", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err.splitlines()

    return call


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{train_batch_size: 4}", "not JSON at line 1 column 2"),
        ("[1, 2]", "must be one JSON object"),
        ('{"train_batch_sise": 4}', "did you mean 'train_batch_size'?"),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage must be at most 3, got 4"),
        (
            '{"train_batch_size": 10, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}',
            "train_batch_size = 10 contradicts train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks = "
            "2 x 3 x 2 = 12",
        ),
        ('{"train_batch_size": 7}', "train_batch_size = 7 does not divide by the number of ranks = 2"),
        ('{"accelerator": "cpuu"}', "no backend named 'cpuu' is installed"),
    ],
)
def test_bad_configuration_is_one_line_and_exit_code_2(main: Main, tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "config.json").write_text(content)
    status, output, errors = main("train", "config.json", "--ranks", 2)
    assert (status, output, len(errors)) == (2, "", 1)
    assert errors[0].startswith("windlass: ")
    assert told in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "missing.json"], "missing.json: there is no such file"),
        (["train", "--accelerator", "cup"], "no backend named 'cup' is installed (installed: cpu"),
        (["train", "--accelerator", "cpu:x"], "the argument names accelerator 'cpu:x', which is not of the form"),
        (["train", "--model", "tyni"], "there is no model named 'tyni', the models are nano, tiny, small, gpt2; did"),
        (["train", "--optimizer", "muom"], "--optimizer must be adamw or muon, got 'muom'; did you mean muon?"),
        (["plan", "--optimizer", "sgd"], "--optimizer must be adamw or muon, got 'sgd', or name another in a config"),
        (["train", "--text", "nowhere.txt"], "text nowhere.txt: there is no such file or folder"),
        (["train", "--text", "."], "the folder holds no .txt file"),
        (["train", "--ranks", "0"], "--ranks must be at least 1, got 0"),
        (["train", "--ranks", "two"], "Invalid value for '--ranks'"),
        (["train", "--steps", "-1"], "--steps must be at least 1, got -1"),
        (["train", "--save-every", "0"], "--save-every must be at least 1, got 0"),
        (["train", "--seed", "-1"], "--seed must be at least 0, got -1"),
        (["train", "--resume"], "--resume needs --out"),
        (["train", "--out", f"{__file__}/run"], "test_cli.py/run: the folder cannot be made, Not a directory; name"),
        (["train", "--rnks", "2"], "No such option: --rnks"),
        (["trian"], "No such command 'trian'"),
        (["plan", "--model", "huge"], "there is no model named 'huge'"),
        (["plan", "--ranks", "0"], "--ranks must be at least 1, got 0"),
        (["run", "nothing.py"], "nothing.py: there is no such program"),
        (["run", "--hosts", "none", __file__], "hosts file none cannot be read"),
        (["run"], "Missing argument"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(main: Main, arguments: list[str], told: str) -> None:
    status, output, errors = main(*arguments)
    assert (status, output, len(errors)) == (2, "", 1)
    assert told in errors[0]


def test_optimizer_that_contradicts_the_configuration_is_one_line_and_exit_code_2(main: Main, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"optimizer": {"type": "AdamW"}}')
    status, output, errors = main("train", "config.json", "--optimizer", "Muon")
    assert (status, output, len(errors)) == (2, "", 1)
    assert errors[0] == (
        "windlass: --optimizer Muon contradicts config.json, which asks for adamw: change its optimizer.type, or leave "
        "out the option"
    )


def test_bad_variable_is_one_line_and_exit_code_2(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_TIMEOUT", "soon")
    assert main("train")[::2] == (
        2,
        ["windlass: WINDLASS_TIMEOUT must be a number of seconds above 0, got 'soon'"],
    )


def test_a_folder_with_a_checkpoint_is_not_overwritten(main: Main, tmp_path: Path) -> None:
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    (tmp_path / "old" / "checkpoints" / "latest").write_text("step10")
    status, _, errors = main("train", "--out", "old")
    assert (status, len(errors)) == (2, 1)
    assert "holds the checkpoint of a run, go on with it by --resume or name another" in errors[0]


def test_ranks_that_contradict_the_launcher_are_refused(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    status, _, errors = main("train", "--ranks", 2, "--out", "x")
    assert (status, len(errors)) == (2, 1)
    assert "--ranks 2 contradicts the 4 ranks that torchrun has started" in errors[0]


def test_help_names_every_command() -> None:
    shown = subprocess.run([sys.executable, "-m", "windlass.cli"], capture_output=True, text=True, check=True)
    assert re.findall(r"^  (\w+)  ", shown.stdout, re.M) == ["train", "run", "plan", "doctor", "conform"]


def test_doctor_reports_as_text_and_json(main: Main) -> None:
    status, output, _ = main("doctor", "--json")
    assert status == 0
    assert json.loads(output)["choice"]["accelerator"].startswith("cpu")
    status, output, _ = main("doctor")
    assert status == 0
    assert "would be used" in output


def test_run_leaves_what_its_plan_promised(main: Main, tmp_path: Path) -> None:
    """Two ranks to the end: every file, the loss, and the same plan as `windlass plan` prints."""
    ended = windlass("train", "--model", "nano", "--ranks", 2, "--steps", 12, "--out", "run", folder=tmp_path)
    assert (ended.status, ended.errors) == (0, [])
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        *("metrics.jsonl", "summary.json", "config.json", "plan.json", "loss.png", "checkpoints"),
    }
    rows = metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert set(rows[0]) == {
        *("step", "loss", "grad_norm", "lr", "tokens_per_s", "step_ms", "loss_scale", "skipped"),
    }
    assert rows[0]["loss"] == pytest.approx(5.545, abs=0.05)  # ln 256: an untrained model guesses uniformly
    assert rows[-1]["loss"] < 4.5
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["first_loss"], summary["final_loss"]) == (rows[0]["loss"], rows[-1]["loss"])
    assert 3 < summary["held_out_loss"] < 4.5
    assert summary["num_ranks"] == 2
    assert summary["peak_bytes"]["device"]["value"] > 0
    assert summary["config"] == json.loads((folder / "config.json").read_text())

    status, output, _ = main("plan", "--model", "nano", "--ranks", 2, "--json")
    planned = json.loads(output)["plan"]
    assert status == 0
    assert summary["plan_hash"] == planned["hash"] == json.loads((folder / "plan.json").read_text())["hash"]
    for step in planned["prediction"]["boundary"]:
        counted = summary["counters"][f"collective/{step['kind']}/{step['tag']}"]
        assert counted == {"calls": 12 * step["calls"], "bytes": 12 * step["bytes"]}


def test_a_run_by_muon_says_so_and_goes_on_by_muon(main: Main, tmp_path: Path) -> None:
    """Two ranks, resumed without the option: what it prints, what it leaves, and what it sent."""
    arguments = ("train", "--model", "nano", "--ranks", 2, "--out", "run")
    ended = windlass(*arguments, "--steps", 2, "--optimizer", "MUON", folder=tmp_path, timeout=150)
    assert (ended.status, ended.errors) == (0, [])
    assert "ZeRO stage 2, Muon, plan" in ended.output
    # q, k, v, projection, up and down in five blocks
    assert "Muon orthogonalises 30 matrices of 983,040 parameters, AdamW updates the rest" in ended.output
    status, output, _ = main("plan", "--model", "nano", "--ranks", 2, "--optimizer", "muon", "--json")
    planned = json.loads(output)
    assert (status, planned["config"]["optimizer"]["type"]) == (0, "muon")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["optimizer"], summary["plan_hash"]) == ("muon", planned["plan"]["hash"])
    for step in planned["plan"]["prediction"]["boundary"]:
        counted = summary["counters"][f"collective/{step['kind']}/{step['tag']}"]
        assert counted == {"calls": 2 * step["calls"], "bytes": 2 * step["bytes"]}

    refused = main(*arguments, "--steps", 3, "--resume", "--optimizer", "adamw")
    assert refused[0] == 2
    assert "the run in run was begun with muon, leave it out to go on with that" in refused[2][0]
    ended = windlass(*arguments, "--steps", 3, "--resume", folder=tmp_path, timeout=150)
    assert (ended.status, ended.errors) == (0, [])
    assert "resumed after step 2 of 3" in ended.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["optimizer"], summary["steps"], len(metrics(tmp_path / "run"))) == ("muon", 3, 3)


def test_a_killed_rank_ends_the_run_in_one_line(tmp_path: Path) -> None:
    arguments = ("train", "--model", "nano", "--ranks", 2, "--steps", 100000, "--out", "run")
    with running(*arguments, folder=tmp_path) as process:
        wait_until(lambda: len(metrics(tmp_path / "run")) >= 3, process)
        ranks = ranks_of(process.pid)
        assert sorted(ranks) == [0, 1]
        os.kill(ranks[1], signal.SIGKILL)
        ended = finish(process, timeout=30)
    assert ended.status == 1
    assert ended.errors == [
        "windlass: rank 1 of 2 was killed by SIGKILL, by hand or because memory ran out; the other ranks were ended"
    ]
    assert not any(map(is_alive, ranks.values()))


def test_ranks_end_with_a_killed_launcher(tmp_path: Path) -> None:
    arguments = ("train", "--model", "nano", "--ranks", 2, "--steps", 100000, "--out", "run")
    with running(*arguments, folder=tmp_path) as process:
        wait_until(lambda: len(metrics(tmp_path / "run")) >= 1, process)
        ranks = ranks_of(process.pid)
        process.kill()
        deadline = time.monotonic() + 10
        while any(map(is_alive, ranks.values())) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(is_alive, ranks.values()))


def test_a_rank_that_never_arrives_ends_the_run_in_one_line(tmp_path: Path) -> None:
    """Rank 0 of two, as torchrun would start it, and nobody else."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": port}
    environment = {**place, "MASTER_ADDR": "127.0.0.1", "WINDLASS_TIMEOUT": "3"}
    ended = windlass("train", "--model", "nano", "--out", "run", folder=tmp_path, environment=environment, timeout=40)
    assert (ended.status, ended.output, len(ended.errors)) == (1, "", 1)
    assert ended.errors[0].startswith("windlass: rank 0: ")
    assert "1" in ended.errors[0].removeprefix("windlass: rank 0: ")
    assert "within 3 s" in ended.errors[0]


QUICK = {
    "train_batch_size": 4,
    "zero_optimization": {"stage": 3},
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 60, "warmup_num_steps": 10}},
}


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """SIGTERM in mid-run, then --resume: the losses are those of a run that nobody stopped, to the bit."""
    (tmp_path / "config.json").write_text(json.dumps(QUICK))
    arguments = ("train", "config.json", "--model", "nano", "--ranks", "2", "--steps", "60")
    with running(*arguments, "--out", "stopped", folder=tmp_path) as process:
        wait_until(lambda: len(metrics(tmp_path / "stopped")) >= 3, process)
        ranks = ranks_of(process.pid)
        process.terminate()
        ended = finish(process, timeout=30)
    done = len(metrics(tmp_path / "stopped"))
    assert (ended.status, done < 60) == (1, True)
    assert ended.errors == [
        f"windlass: stopped after step {done} of 60, which is kept in stopped; the same command with --resume goes on"
    ]
    assert not any(map(is_alive, ranks.values()))

    resumed = windlass(*arguments, "--out", "stopped", "--resume", folder=tmp_path)
    assert (resumed.status, resumed.errors) == (0, [])
    assert f"resumed after step {done} of 60" in resumed.output
    assert windlass(*arguments, "--out", "whole", folder=tmp_path).status == 0
    stopped, whole = metrics(tmp_path / "stopped"), metrics(tmp_path / "whole")
    assert [row["step"] for row in stopped] == list(range(1, 61))
    assert [(row["loss"], row["lr"]) for row in stopped] == [(row["loss"], row["lr"]) for row in whole]


def test_example_of_the_readme_runs_on_two_ranks(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert code is not None
    (tmp_path / "example.py").write_text(code[1])
    ended = windlass("run", "--ranks", 2, "example.py", folder=tmp_path)
    assert (ended.status, ended.errors) == (0, [])
    losses = re.findall(r"rank [01] of 2: loss (\d\.\d+)", ended.output)
    assert len(losses) == 2
    assert max(map(float, losses)) < 5  # untrained it is about 32, the variance of the sum


def test_a_failing_program_keeps_its_traceback_and_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(
        "import os, sys\nprint(sys.argv[1:])\nif os.environ['RANK'] == '1':\n    raise ArithmeticError('no sum')\n"
    )
    ended = windlass("run", "--ranks", "2", "fails.py", "--name", "x", folder=tmp_path)
    assert ended.status == 1
    assert ended.output.count("['--name', 'x']") == 2  # on lines of their own or not, as the ranks happened to write
    assert "ArithmeticError: no sum" in ended.errors
    assert ended.errors[-1] == (
        "windlass: rank 1 of 2 ended with exit code 1, what it printed is above; the other ranks were ended"
    )


def test_a_program_that_is_a_rank_already_is_not_started_again(tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(
        "import os\nprint(os.environ['RANK'], os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK'])\n"
    )
    mpi = {"RANK": "1", "SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    environment = {f"OMPI_COMM_WORLD_{name}": value for name, value in mpi.items()}
    ended = windlass("run", "show.py", folder=tmp_path, environment=environment)
    assert (ended.status, ended.output, ended.errors) == (0, "1 2 1\n", [])


def test_hosts_are_started_and_end_together(tmp_path: Path) -> None:
    """Through an `ssh` that runs the command here: two hosts, three ranks, one world."""
    fake = tmp_path / "bin" / "ssh"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nexec sh -c "$5"\n')  # ssh -tt -o BatchMode=yes HOST COMMAND
    fake.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=2\n")
    (tmp_path / "show.py").write_text("import os\nopen('rank{RANK}of{WORLD_SIZE}'.format(**os.environ), 'w').close()\n")
    environment = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "MASTER_PORT": port}
    ended = windlass("run", "--hosts", "hosts", "show.py", folder=tmp_path, environment=environment)
    assert ended.status == 0, ended
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank0of3", "rank1of3", "rank2of3"]
