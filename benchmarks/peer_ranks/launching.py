"""How one system is started and what comes back: ranks under torch.distributed.run, one JSON file from each."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peer_ranks.candidates import RANKS, Candidate

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).resolve().parent
CACHE = ROOT / ".cache" / "peers"
CORPUS = CACHE / "corpus.bin"
LONGEST_RUN = 900  # seconds; DeepSpeed compiles its operators in its first run, about 3 minutes


@dataclass(frozen=True)
class Run:
    """What one start of one candidate gave: means over ranks, or the reason why there is nothing."""

    candidate: Candidate
    round: int
    load: float  # processes that wanted to run when it started, over the last minute
    reason: str = ""  # empty: measured
    total_ms: tuple[float, ...] = ()  # per timed step
    forward_ms: tuple[float, ...] = ()
    backward_ms: tuple[float, ...] = ()
    step_ms: tuple[float, ...] = ()
    processor_ms: tuple[float, ...] = ()
    update_processor_ms: tuple[float, ...] = ()  # of the rank that took most, in the update alone
    marks: tuple[tuple[tuple[float, ...], ...], ...] = ()  # by rank and step, the warm ones too: see workload.measure
    losses: tuple[float, ...] = ()  # of every step, the warm ones too
    peak_resident_mib: float = 0.0  # of the largest rank
    versions: dict[str, str] | None = None


@contextmanager
def hold_machine() -> Iterator[None]:
    """Keep a second comparison out: two would slow each other, and write into the same folders. Raises RuntimeError."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:  # given back when the process ends, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError("another comparison runs on this tree; wait for its end, then start again") from error
        yield


def expose_model() -> Path:
    """A folder that holds windlass and nothing else, for an environment without it: the model needs torch alone.

    The root of the tree will not do. It would also offer a package `accelerator`, which DeepSpeed looks for.
    """
    folder = CACHE / "importable"
    package = folder / "windlass"
    if package.is_symlink():  # as it once was
        package.unlink()
    package.mkdir(parents=True, exist_ok=True)
    for part in (*(ROOT / "windlass").iterdir(), *(ROOT / name for name in ("accelerator", "backends", "core"))):
        link = package / part.name
        link.unlink(missing_ok=True)
        link.symlink_to(part, target_is_directory=part.is_dir())
    return folder


def start_ranks(
    candidate: Candidate, interpreter: str, output: Path, *, warm: int, steps: int, profile: Path | None
) -> str:
    """Run the ranks to their end, each writing its file into `output`. Returns why they failed, or nothing."""
    command = [interpreter, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={candidate.ranks}"]
    command += [str(SCRIPTS / candidate.script), f"--corpus={CORPUS}", f"--output={output}"]
    command += [f"--warm={warm}", f"--steps={steps}", f"--stage={candidate.stage or 0}"]
    command += [f"--optimizer={candidate.optimizer}", f"--variant={candidate.variant}"]
    command += [f"--profile={profile}"] if profile else []
    environment = os.environ | {"OMP_NUM_THREADS": str(RANKS // candidate.ranks)}
    if candidate.system == "deepspeed":
        for lock in (CACHE / "torch_extensions").glob("*/lock"):
            lock.unlink()  # a run that was killed left it, and the next would wait; `hold_machine` keeps others out
        environment |= {
            "DS_ACCELERATOR": "cpu",
            "PATH": f"{Path(interpreter).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # ninja lies there
            "PYTHONPATH": str(expose_model()),
            "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(CACHE / "torch_extensions")),
        }
    log = output / "log.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
        try:
            code = process.wait(LONGEST_RUN)
        except subprocess.TimeoutExpired:
            return f"no end after {LONGEST_RUN} s, see {log}"
        finally:
            if process.poll() is None:
                process.terminate()  # the launcher passes it on to the ranks, which a kill would leave behind
                process.wait(60)
    if code == 0:
        return ""
    # A rank's traceback ends in a line like "package.errors.TheError: text"; the launcher's own error has no text.
    error = re.compile(r"^(?:\[rank\d+\]: )?((?:\w+\.)*[A-Z]\w+: .*\S)\s*$", re.MULTILINE)
    errors = [
        line for line in error.findall(log.read_text(encoding="utf-8", errors="replace")) if "Warning" not in line
    ]
    return f"{errors[0][:200] if errors else f'exit status {code}'}, see {log}"


def run_candidate(
    candidate: Candidate, number: int, interpreter: str, *, warm: int, steps: int, profile: Path | None
) -> Run:
    """One start of one candidate."""
    load = os.getloadavg()[0]
    output = CACHE / "runs" / candidate.name
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    reason = start_ranks(candidate, interpreter, output, warm=warm, steps=steps, profile=profile)
    if reason:
        return Run(candidate, number, load, reason)
    reports = [json.loads((output / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(candidate.ranks)]

    def mean_over_ranks(key: str) -> tuple[float, ...]:
        return tuple(statistics.fmean(values) for values in zip(*(each[key] for each in reports), strict=True))

    keys = ("total_ms", "forward_ms", "backward_ms", "step_ms", "processor_ms", "losses")
    return Run(
        candidate, number, load,
        **{key: mean_over_ranks(key) for key in keys},
        update_processor_ms=tuple(map(max, zip(*(each["update_processor_ms"] for each in reports), strict=True))),
        marks=tuple(tuple(map(tuple, each["marks"])) for each in reports),
        peak_resident_mib=max(each["peak_resident_mib"] for each in reports),
        versions=reports[0]["versions"],
    )  # fmt: skip


def has_deepspeed(interpreter: str) -> bool:
    """Whether that interpreter could import DeepSpeed; importing it takes seconds, so it is only looked for."""
    question = "import importlib.util, sys; sys.exit(importlib.util.find_spec('deepspeed') is None)"
    return subprocess.run([interpreter, "-c", question], check=False).returncode == 0
