"""The `windlass` command. It reads the command line, checks what it says and says in one line what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from windlass.cli_errors import end_on_sigterm, fail, one_line_errors, say, unsaid_messages

if TYPE_CHECKING:
    from windlass.config import Config
    from windlass.job import Host, Job
    from windlass.recipe import TrainOptions

app = typer.Typer(
    help="Train the same model on whatever computes.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
# Click's UsageError, wherever this version of typer keeps it: in click, or in a copy of its own.
_USAGE_ERROR: Any = typer.BadParameter.__base__
_STOPPED = 130  # what newer versions of typer return after Ctrl-C, where older ones raise Abort

ConfigArgument = Annotated[
    Path | None, typer.Argument(metavar="[CONFIG]", help="JSON file; DeepSpeed's keys are understood.")
]
ModelOption = Annotated[str, typer.Option(help="Size of the built-in GPT: nano, tiny, small, gpt2.")]
OptimizerOption = Annotated[str | None, typer.Option(help="adamw or muon.  [default: the configuration's, or adamw]")]
AcceleratorOption = Annotated[str | None, typer.Option(help='Device to train on, as "cpu" or "cuda:1".')]


@app.command()
def train(
    config: ConfigArgument = None,
    accelerator: AcceleratorOption = None,
    ranks: Annotated[int | None, typer.Option(help="Processes on this host.  [default: 1]")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 200,
    model: ModelOption = "tiny",
    optimizer: OptimizerOption = None,
    text: Annotated[Path | None, typer.Option(help="A text, or a folder of .txt files.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run.  [default: runs/MODEL-TIME]")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and samples.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.  [default: only the end]")] = None,
) -> None:
    """Train a built-in GPT on text.

    By default the text is English that every Python ships, and a token is a byte.
    """
    with one_line_errors():
        from windlass.job import detect_job

        job = detect_job(os.environ)
        num_ranks = _decide_ranks(job, ranks)
        _require_positive("--steps", steps)
        _require_positive("--save-every", save_every)
        if seed is not None and seed < 0:
            raise ValueError(f"--seed must be at least 0, got {seed}")
        if resume and out is None:
            raise ValueError("--resume needs --out, the folder of the run to go on with")
        if out is None and job.place is not None and job.place.num_ranks > 1:
            raise ValueError(f"--out is needed where {job.launcher} starts the ranks, so that all name the same folder")
        from windlass.launch import set_threads

        threads = set_threads(num_ranks, os.environ) if job.place is None else None  # read when torch is imported
        from windlass.recipe import TrainOptions, check_options, make_folder

        options = TrainOptions(
            out=str(out or f"runs/{model}-{time.strftime('%Y%m%d-%H%M%S')}"),
            config=None if config is None else str(config),
            model=model,
            steps=steps,
            accelerator=accelerator,
            text=None if text is None else str(text),
            seed=seed,
            resume=resume,
            save_every=save_every,
            optimizer=optimizer,
        )
        with unsaid_messages():  # the ranks will say them
            resolved = check_options(options, num_ranks)
        _check_accelerator(accelerator, resolved)
        make_folder(options)
    if threads is not None:
        say(threads)
    sys.exit(_train(options, job, num_ranks))


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def run(
    script: Annotated[Path, typer.Argument(help="A Python program that uses windlass.")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[ARGS]...", help="Its own arguments.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Processes on this host.")] = None,
    hosts: Annotated[Path | None, typer.Option(help="File with a line 'name slots=N' for each host.")] = None,
) -> None:
    """Start a program on several ranks.

    On this host, on those of a file, or as Slurm, PBS or MPI say.
    """
    with one_line_errors():
        from windlass.job import detect_job, read_hosts
        from windlass.launch import host_commands, run_on_hosts, set_threads, slurm_command, start_ranks, this_host

        if not script.is_file():
            raise ValueError(f"{script}: there is no such program, give the path of a Python file")
        job = detect_job(os.environ)
        if hosts is not None and ranks is not None:
            raise ValueError("--hosts says how many ranks there are, leave out --ranks")
        command = [str(script), *(arguments or [])]
        named: tuple[Host, ...] = () if hosts is None else read_hosts(hosts)
        if not named and ranks is None and len(job.hosts) > 1:
            named = job.hosts
        if not named and ranks is None and job.hosts:
            ranks = job.hosts[0].slots
        num_ranks = _decide_ranks(job, ranks)
    if job.place is not None:
        os.execve(sys.executable, [sys.executable, *command], {**os.environ, **job.place.variables()})
    with one_line_errors(failed=1), end_on_sigterm():
        if not named:
            threads = set_threads(num_ranks, os.environ)
            if threads is not None:
                say(threads)
            start_ranks([sys.executable, *command], num_ranks)
        elif hosts is None and job.launcher == "Slurm":
            run_on_hosts(["Slurm"], [slurm_command(named, command)])
        else:
            folder = str(Path.cwd())
            commands = host_commands(named, command, folder=folder, variables=os.environ, here=this_host())
            run_on_hosts([host.name for host in named], commands)


@app.command()
def plan(
    config: ConfigArgument = None,
    model: ModelOption = "tiny",
    optimizer: OptimizerOption = None,
    ranks: Annotated[int, typer.Option(help="Ranks to plan for.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan and the configuration as JSON.")] = False,
) -> None:
    """Print a plan and its configuration.

    The plan is what training would follow; nothing is trained.
    """
    with one_line_errors():
        _require_positive("--ranks", ranks)
        from windlass.recipe import show_messages

        show_messages()
        resolved = _plan_config(config, model, ranks, optimizer)
        import torch

        from windlass.models import build_model
        from windlass.planning import plan_for

        with torch.device("meta"):
            made = plan_for(build_model(model), resolved)
    for message in resolved.messages:
        say(message)
    if as_json:
        print(json.dumps({"config": resolved.resolved(), "plan": made.to_json()}, indent=2))
        return
    print(f"{made}\n\nConfiguration\n{json.dumps(resolved.resolved(), indent=2)}")


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Say which accelerators can be used here.

    And why the others cannot.
    """
    from windlass.doctor import collect_report, render

    report = collect_report()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        from rich.console import Console

        render(report, Console())
    if report["choice"]["accelerator"] is None:
        sys.exit(1)


@app.command()
def conform(
    accelerator: Annotated[str, typer.Option(help='Backend or device under test, as "cpu" or "cuda:1".')],
    level: Annotated[int, typer.Option(help="Run the levels from 0 to this one, at most 5.")] = 3,
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="Write report.json and report.html there.")] = None,
    expected_failures: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML file of tests that are known to fail.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    select: Annotated[
        str | None, typer.Option("-k", metavar="EXPR", help="Run only tests whose names match, and claim no level.")
    ] = None,
) -> None:
    """Test a backend with the conformance suite.

    Level 0 device and memory, 1 kernels, 2 collectives, 3 training, 4 offload, 5 rates.
    """
    from rich.console import Console

    from windlass.conformance.command import ConformOptions, SuiteFailed, check_conform, exit_sentence, run_suite
    from windlass.conformance.display import ProgressDisplay, show_report

    options = ConformOptions(accelerator, level, report, expected_failures, select)
    with one_line_errors():
        check_conform(options)
        display = None if as_json else ProgressDisplay(Console(stderr=True))
        try:
            with display or contextlib.nullcontext(), end_on_sigterm():
                result, status = run_suite(options, display)
        except SuiteFailed as error:
            fail(str(error), 1)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        show_report(result, Console())
        print(exit_sentence(result, report))
    sys.exit(status)


def main() -> NoReturn:
    """The entry point. Exit codes: 0 good, 1 the run failed, 2 bad usage or bad configuration."""
    try:
        status = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except _USAGE_ERROR as error:
        fail(" ".join(str(error.format_message()).split()), 2)
    except (KeyboardInterrupt, typer.Abort):
        fail("stopped", 1)
    if status == _STOPPED:
        fail("stopped", 1)
    sys.exit(0)


def _train(options: TrainOptions, job: Job, num_ranks: int) -> int:
    """Be the ranks, or start them; the exit code."""
    from windlass.launch import RanksFailed, start_ranks
    from windlass.recipe import run_as_rank

    if job.place is not None:
        os.environ.update(job.place.variables())
    if job.place is not None or num_ranks == 1:
        return run_as_rank(options)
    program = "from windlass.recipe import start_as_rank; start_as_rank()"
    # -P: nothing in the current folder can stand in for a module of the same name.
    command = [sys.executable, "-P", "-c", program, json.dumps(dataclasses.asdict(options))]
    try:
        start_ranks(command, num_ranks)
    except RanksFailed as error:
        say(str(error))
        return 1
    return 0


def _decide_ranks(job: Job, ranks: int | None) -> int:
    """How many ranks the job has or is to have."""
    _require_positive("--ranks", ranks)
    if job.place is None:
        return ranks or 1
    if ranks not in (None, job.place.num_ranks):
        raise ValueError(
            f"--ranks {ranks} contradicts the {job.place.num_ranks} ranks that {job.launcher} has started, leave it out"
        )
    return job.place.num_ranks


def _plan_config(config: Path | None, model: str, ranks: int, optimizer: str | None) -> Config:
    from windlass.models import find_shape
    from windlass.recipe import TrainOptions, resolve_config

    find_shape(model)
    options = TrainOptions(out="", config=None if config is None else str(config), model=model, optimizer=optimizer)
    if config is not None:
        return resolve_config(options, ranks)
    from windlass import open_accelerator  # whose fast dtypes decide where no configuration does

    accelerator = open_accelerator()
    try:
        return resolve_config(options, ranks, accelerator.capabilities.matmul_dtypes)
    finally:
        accelerator.close()


def _check_accelerator(name: str | None, config: Config) -> None:
    """Raise if somebody names an accelerator that cannot be had; one that nobody names is chosen by the ranks."""
    from windlass.accelerator.environment import read_environment
    from windlass.accelerator.registry import Registry

    registry = Registry(read_environment())
    if any(one not in (None, "", "auto") for one in (name, registry.environment.accelerator, config.accelerator)):
        registry.device_index(registry.choose(name, config.accelerator))


def _require_positive(option: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{option} must be at least 1, got {value}")


if __name__ == "__main__":
    main()
