"""The one command for a GPU: what it makes of rows, and a small run of it on the host."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_benchmark import ROOT, Rows, make_row, part
from windlass.accelerator.reference import SCHEMAS


def goals_of(rows: Rows) -> dict[str, Any]:
    return {goal.goal.partition(":")[0]: goal for goal in part("goals").judge(rows)}


# -- goals -----------------------------------------------------------------------------------------------------


def test_nothing_measured_meets_no_goal() -> None:
    goals = goals_of([])
    assert {goal.state for goal in goals.values()} == {"not measured"}
    assert len(goals) == 8  # two of the nine are about linear_cross_entropy


@pytest.mark.parametrize(("share", "state"), [(0.85, "met"), (0.849, "missed")])
def test_adamw_is_held_against_copies_by_what_windlass_uses(share: float, state: str) -> None:
    case = "bf16 gradient, low bf16, 268,435,456"
    rows = [
        make_row("adamw", case, "windlass triton", ours=True, share=share),
        make_row("adamw", case, "windlass reference", share=0.99),
        make_row("adamw", "fp32 gradient, low none, 268,435,456", "windlass triton", ours=True, share=0.99),
        make_row("adamw", case, "windlass other", ours=True, error="RuntimeError: none"),
    ]
    assert goals_of(rows)["adamw"].state == state


def test_polar_counts_for_its_own_shape_only() -> None:
    rows = [
        make_row("polar", "4096 x 16384, products in bfloat16", "windlass triton", ours=True, share=0.9),
        make_row("polar", "4096 x 4096, products in bfloat16", "windlass triton", ours=True, share=0.6),
        make_row("polar_gram", "4096 x 16384, products in float16", "windlass triton", ours=True, share=1.2),
    ]
    goals = goals_of(rows)
    assert (goals["polar, 4096 x 4096"].state, goals["polar, 4096 x 4096"].seen) == ("missed", "60%")
    assert (goals["polar_gram, 4096 x 16384"].state, goals["polar_gram, 4096 x 16384"].seen) == ("met", "120%")


def test_cross_entropy_is_held_against_the_plain_one() -> None:
    rows = [
        make_row("linear_cross_entropy", "", "windlass", ours=True, seconds=0.09, peak_bytes=1000),
        make_row("linear_cross_entropy", "", "torch, plain", seconds=0.1, peak_bytes=8000),
        make_row("linear_cross_entropy", "", "torch, plain bf16", seconds=0.05, peak_bytes=1000),
    ]
    memory, time = (goal for goal in part("goals").judge(rows) if goal.goal.startswith("linear_cross_entropy"))
    assert (memory.seen, memory.state) == ("12.5%", "met")
    assert (time.seen, time.state) == ("90%", "met")


@pytest.mark.parametrize(("loss", "state"), [(2.0, "met"), (2.5, "missed"), (None, "missed")])
def test_the_training_step_counts_only_if_it_is_the_same_training(loss: float | None, state: str) -> None:
    rows = [
        make_row("step", "", "windlass", ours=True, value=110.0, facts={"loss": loss}),
        make_row("step", "", "torch, bf16 with fp32 masters", value=105.0, facts={"loss": 2.02}),
        make_row("step", "", "torch, autocast over fp32", value=90.0, facts={"loss": 2.0}),
        make_row("step", "", "torch, bf16 without masters", value=200.0, facts={"loss": 2.0}),
        make_row("step", "", "windlass without kernels for adamw", value=300.0),
    ]
    goal = goals_of(rows)["training step"]
    assert goal.state == state
    assert goal.seen.startswith("105%" if state == "met" else "losses")


def test_tests_and_conformance_count_as_goals() -> None:
    levels = [make_row(f"level {n}", "", "windlass", facts={"state": "reached"}) for n in range(4)]
    tests = [make_row("tests/cuda", "9 passed", "windlass", facts={"tests": 9})]
    rows = [{**row, "part": "conformance"} for row in levels] + [{**row, "part": "tests"} for row in tests]
    assert goals_of(rows)["conformance"].state == goals_of(rows)["tests"].state == "met"
    failing = [row | {"error": "1 failed"} if row["part"] == "tests" else row for row in rows[1:]]
    assert goals_of(failing)["conformance"].state == goals_of(failing)["tests"].state == "missed"


# -- formulas --------------------------------------------------------------------------------------------------


def test_the_shape_counts_what_the_model_has() -> None:
    from windlass.models import GPT

    trained = part("gpt").model_shape(part("context").Context(None, "full"))
    with torch.device("meta"):
        model = GPT(trained.shape)
    shapes = sorted(tuple(parameter.shape) for parameter in model.parameters())
    assert sorted(trained.parameter_shapes()) == shapes
    assert 0.9e9 < sum(parameter.numel() for parameter in model.parameters()) < 1.1e9
    blocks = [parameter.numel() for parameter in model.blocks.parameters() if parameter.dim() == 2]
    assert sum(count * rows * columns for (rows, columns), count in trained.stacks().items()) == sum(blocks)
    head = trained.shape.vocabulary * trained.shape.width
    attention = 2 * 2 * 3 * trained.shape.layers * trained.shape.width * trained.shape.sequence_length / 2
    assert trained.flops_per_token == 6 * (sum(blocks) + head) + attention


def test_polar_is_counted_in_the_flops_of_torchs_own_iteration() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from windlass.accelerator.polar import standard_flops

    iterate = part("matrix_kernels").find_torch_iteration()
    assert iterate is not None
    for shape in ((8, 8), (4, 12), (12, 4)):
        with FlopCounterMode(display=False) as counter:
            iterate(torch.randn(shape))
        assert standard_flops(*shape, 5) == counter.get_total_flops()


# -- the command -----------------------------------------------------------------------------------------------


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


@pytest.mark.slow
def test_a_small_run_of_every_part(tmp_path: Path) -> None:
    done = run_command("--accelerator", "cpu", "--scale", "small", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Goals, on cpu:0, scale small" in done.stdout
    report = json.loads((tmp_path / "gpu.json").read_text(), parse_constant=pytest.fail)
    assert report["device"]["accelerator"] == "cpu:0"
    assert report["device"]["versions"]["torch"] == torch.__version__
    names = ("conformance", "tests", "rates", "kernels", "training")
    assert [(one["name"], one["error"]) for one in report["parts"]] == [(name, "") for name in names]
    failed = {(row["name"], row["by"], row["error"]) for row in report["rows"] if row["error"]}
    assert failed <= {("step", "DeepSpeed", "not installed")}
    kernels = [row for row in report["rows"] if row["part"] == "kernels"]
    assert all(row["seconds"] > 0 and row["value"] > 0 and row["share"] > 0 for row in kernels)
    backward = {"rms_norm_backward", "layer_norm_backward"}  # measured with the forward of the same norm
    assert {row["name"] for row in kernels} == {schema.name for schema in SCHEMAS} - backward
    rates = {row["name"] for row in report["rows"] if row["part"] == "rates" and row["value"] > 0}
    assert rates >= {"copy, device", "copy, host", "link, up", "link, down", "link, both", "matmul, float32"}
    check_training([row for row in report["rows"] if row["part"] == "training"])


def check_training(rows: Rows) -> None:
    steps = {row["by"]: row for row in rows if row["name"] == "step" and not row["error"]}
    plain = steps["torch, bf16 with fp32 masters"]
    for by in ("windlass", "windlass, norms, loss, captured", "windlass, capture_update"):
        assert steps[by]["facts"]["loss"] == pytest.approx(plain["facts"]["loss"], rel=0.02)
    assert "windlass without kernels for square_sum" in steps
    shares = [row["facts"]["share_of_step"] for row in rows if row["name"] == "Muon's step"]
    assert len(shares) == 2
    assert all(0 < share < 1 for share in shares)


def test_an_accelerator_that_cannot_be_had_is_said_and_not_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "mine.log").write_text("of somebody else")
    (tmp_path / "rates.log").write_text("of a run before")
    done = run_command("--accelerator", "cpuu", "--only", "rates", "--out", str(tmp_path))
    assert done.returncode == 1
    assert (tmp_path / "mine.log").is_file()
    assert "of a run before" not in (tmp_path / "rates.log").read_text()
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert "Did you mean 'cpu'?" in report["parts"][0]["error"]
    assert report["rows"] == []


@pytest.mark.parametrize(("words", "wanted"), [(("--only", "rate"), "--only knows"), (("--minutes", "0"), "--minutes")])
def test_a_wrong_option_is_told_in_one_line(words: tuple[str, ...], wanted: str) -> None:
    done = run_command(*words)
    assert done.returncode == 2
    assert wanted in done.stderr.splitlines()[-1]
