"""What every system trains and how it is timed: one GPT, one text, one loop. Each rank writes a JSON file.

Nothing here belongs to a system, and no system's communication is used to report: the driver reads all ranks' files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import sys
import sysconfig
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from windlass.models import GPT, SHAPES

SHAPE = replace(SHAPES["small"], name="peers", vocabulary=8192)  # 8 layers of width 512, sequences of 256
MICRO_BATCH = 4  # sequences per rank and step; one micro-batch is one step
SEED = 1234
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, LARGEST_NORM = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
_TEXT_CHARACTERS = 3_000_000
_UNKNOWN = 0


@dataclass(frozen=True)
class Settings:
    """What the driver asks of one rank."""

    corpus: Path  # written by `write_corpus`
    output: Path  # folder for this rank's JSON file
    warm: int  # steps before the timed ones
    steps: int  # timed steps
    stage: int  # of ZeRO; not every system has stages
    variant: str  # the system's own way of computing in bf16, where it has several
    profile: Path | None  # rank 0 writes the profile of one more step there

    @property
    def rank(self) -> int:
        """This process, from 0."""
        return int(os.environ["RANK"])

    @property
    def num_ranks(self) -> int:
        """All processes of the run."""
        return int(os.environ["WORLD_SIZE"])


def read_settings() -> Settings:
    """The command line of a rank script."""
    parser = argparse.ArgumentParser(description="One rank of one system; started by benchmarks/peers.py.")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--warm", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--variant", default="")
    parser.add_argument("--profile", type=Path)
    return Settings(**vars(parser.parse_args()))


def write_corpus(path: Path) -> None:
    """Write the words of the standard library's modules as 16-bit numbers.

    A word is a name, a digit, a run of blanks or a single sign; the most frequent get a number of their own. The
    driver calls this once, so that a system in another environment, with another Python, reads the same text.
    """
    text = ""
    for module in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += module.read_text(encoding="utf-8", errors="replace")
        if len(text) >= _TEXT_CHARACTERS:
            break
    words = re.findall(r"[^\W\d]+|\d|\s+|[^\w\s]", text[:_TEXT_CHARACTERS])
    frequent = Counter(words).most_common(SHAPE.vocabulary - 1)
    numbers = {word: number for number, (word, _) in enumerate(frequent, start=_UNKNOWN + 1)}
    path.write_bytes(array("H", (numbers.get(word, _UNKNOWN) for word in words)).tobytes())


def build_model() -> GPT:
    """The model, with the same first weights on every rank and in every system."""
    torch.manual_seed(SEED)
    return GPT(SHAPE)


def build_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """PyTorch's fastest AdamW, for the systems that leave the optimizer to the user."""
    return torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY, fused=True
    )


def engine_config(stage: int) -> dict[str, object]:
    """The training in the keys that DeepSpeed and windlass share; precision is left out."""
    return {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": LARGEST_NORM,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LEARNING_RATE, "betas": list(BETAS), "eps": EPSILON, "weight_decay": WEIGHT_DECAY},
        },
        "zero_optimization": {"stage": stage},
    }


def _batches(settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:  # ids and next ids, (MICRO_BATCH, sequence)
    words = torch.frombuffer(bytearray(settings.corpus.read_bytes()), dtype=torch.uint16).to(torch.int64)
    length = SHAPE.sequence_length + 1
    random = torch.Generator().manual_seed(SEED)
    mine = slice(settings.rank * MICRO_BATCH, (settings.rank + 1) * MICRO_BATCH)
    while True:  # every rank draws the whole batch and takes its own rows
        starts = torch.randint(len(words) - length, (settings.num_ranks * MICRO_BATCH,), generator=random)
        rows = words[starts[mine, None] + torch.arange(length)]
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def measure(
    settings: Settings,
    forward: Callable[[Tensor, Tensor], Tensor],  # ids and next ids to the mean loss
    backward: Callable[[Tensor], object],
    step: Callable[[], object],  # clips, updates, and clears the gradients
    *,
    versions: dict[str, str] | None = None,
) -> None:
    """Train, timing each phase, and write this rank's file: milliseconds per timed step, losses of all steps."""
    batches = _batches(settings)
    phases: dict[str, list[float]] = {"forward_ms": [], "backward_ms": [], "step_ms": [], "total_ms": []}
    processor_ms: list[float] = []
    losses: list[Tensor] = []

    def train_once() -> None:
        ids, targets = next(batches)
        processor, began = time.process_time(), time.perf_counter()
        loss = forward(ids, targets)
        forwarded = time.perf_counter()
        backward(loss)
        backwarded = time.perf_counter()
        step()
        ended = time.perf_counter()
        processor_ms.append((time.process_time() - processor) * 1e3)
        losses.append(loss.detach().float().clone())
        marks = (forwarded - began, backwarded - forwarded, ended - backwarded, ended - began)
        for name, seconds in zip(phases, marks, strict=True):
            phases[name].append(seconds * 1e3)

    for _ in range(settings.warm + settings.steps):
        train_once()
    timed = {name: values[settings.warm :] for name, values in phases.items()}
    timed["processor_ms"] = processor_ms[settings.warm :]
    values = [loss.item() for loss in losses]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if settings.profile is not None:  # one step more, so that the profiler slows none that is timed
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            train_once()
        if settings.rank == 0:
            table = profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=60)
            settings.profile.write_text(table + "\n", encoding="utf-8")

    report = {
        "rank": settings.rank,
        "median_ms": statistics.median(timed["total_ms"]),
        **timed,
        "losses": values,
        "peak_resident_mib": peak / (2**20 if sys.platform == "darwin" else 2**10),  # bytes there, KiB elsewhere
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, **(versions or {})},
    }
    (settings.output / f"rank{settings.rank}.json").write_text(json.dumps(report), encoding="utf-8")
