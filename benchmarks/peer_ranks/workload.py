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
from torch import Tensor

from windlass.models import GPT, SHAPES

SHAPE = replace(SHAPES["small"], name="peers", vocabulary=8192)  # 8 layers of width 512, sequences of 256
SEQUENCES = 8  # of one step, over all ranks; a rank's part is one micro-batch
SEED = 1234
LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, LARGEST_NORM = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
MUON_LEARNING_RATE, MOMENTUM = 0.02, 0.95  # of the matrices in the blocks; AdamW keeps the others
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
    optimizer: str  # adamw or muon
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

    @property
    def micro_batch(self) -> int:
        """Sequences of this rank in a step."""
        return SEQUENCES // self.num_ranks


def read_settings() -> Settings:
    """The command line of a rank script."""
    parser = argparse.ArgumentParser(description="One rank of one system; started by benchmarks/peers.py.")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--warm", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--optimizer", default="adamw")
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


def build_optimizers(model: GPT, settings: Settings) -> list[torch.optim.Optimizer]:
    """PyTorch's own, AdamW in its fastest form, for the systems that leave the optimizer to the user."""
    adamw = {"lr": LEARNING_RATE, "betas": BETAS, "eps": EPSILON, "weight_decay": WEIGHT_DECAY, "fused": True}
    if settings.optimizer == "adamw":
        return [torch.optim.AdamW(model.parameters(), **adamw)]
    matrices = [parameter for parameter in model.blocks.parameters() if parameter.dim() == 2]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    muon = torch.optim.Muon(matrices, lr=MUON_LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    return [muon, torch.optim.AdamW(others, **adamw)]


def engine_config(settings: Settings) -> dict[str, object]:
    """The training in the keys that DeepSpeed and windlass share; precision is left out."""
    params: dict[str, object] = {"betas": list(BETAS), "eps": EPSILON, "weight_decay": WEIGHT_DECAY}
    if settings.optimizer == "adamw":
        optimizer = {"type": "AdamW", "params": params | {"lr": LEARNING_RATE}}
    else:
        own = {"lr": MUON_LEARNING_RATE, "momentum": MOMENTUM, "adam_lr": LEARNING_RATE}
        optimizer = {"type": "Muon", "params": params | own}
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": LARGEST_NORM,
        "optimizer": optimizer,
        "zero_optimization": {"stage": settings.stage},
    }


def _batches(settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:  # ids and next ids, (micro_batch, sequence)
    words = torch.frombuffer(bytearray(settings.corpus.read_bytes()), dtype=torch.uint16).to(torch.int64)
    length = SHAPE.sequence_length + 1
    random = torch.Generator().manual_seed(SEED)
    mine = slice(settings.rank * settings.micro_batch, (settings.rank + 1) * settings.micro_batch)
    while True:  # every rank draws the whole batch and takes its own rows
        starts = torch.randint(len(words) - length, (SEQUENCES,), generator=random)
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
    """Train, timing each phase, and write this rank's file: milliseconds per timed step, losses of all steps.

    `marks` are the times, in seconds of a clock that all ranks of a machine share, at which each step began, had its
    loss, its gradients and its new weights.
    """
    batches = _batches(settings)
    phases: dict[str, list[float]] = {"forward_ms": [], "backward_ms": [], "step_ms": [], "total_ms": []}
    processor_ms: list[float] = []
    update_processor_ms: list[float] = []
    marks: list[tuple[float, ...]] = []
    losses: list[Tensor] = []

    def train_once() -> None:
        ids, targets = next(batches)
        processor, began = time.process_time(), time.perf_counter()
        loss = forward(ids, targets)
        forwarded = time.perf_counter()
        backward(loss)
        backwarded, processor_then = time.perf_counter(), time.process_time()
        step()
        ended, processor_now = time.perf_counter(), time.process_time()
        processor_ms.append((processor_now - processor) * 1e3)
        update_processor_ms.append((processor_now - processor_then) * 1e3)
        marks.append((began, forwarded, backwarded, ended))
        losses.append(loss.detach().float().clone())
        durations = (forwarded - began, backwarded - forwarded, ended - backwarded, ended - began)
        for name, seconds in zip(phases, durations, strict=True):
            phases[name].append(seconds * 1e3)

    for _ in range(settings.warm + settings.steps):
        train_once()
    timed = {name: values[settings.warm :] for name, values in phases.items()}
    timed["processor_ms"] = processor_ms[settings.warm :]
    timed["update_processor_ms"] = update_processor_ms[settings.warm :]
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
        "marks": marks[: settings.warm + settings.steps],
        "peak_resident_mib": peak / (2**20 if sys.platform == "darwin" else 2**10),  # bytes there, KiB elsewhere
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__, **(versions or {})},
    }
    (settings.output / f"rank{settings.rank}.json").write_text(json.dumps(report), encoding="utf-8")
