"""One rank's part in the built-in training job: steps, measures, checkpoints, the end, by the engine's public face."""

from __future__ import annotations

import platform
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import FrameType
from typing import Any, Protocol

import torch
import torch.nn.functional as F

import windlass
from windlass.accelerator.interface import Accelerator, MemoryStats, Place
from windlass.engine import Engine
from windlass.launch import Interrupted
from windlass.models import ModelShape
from windlass.progress import show_progress
from windlass.run_folder import RunFolder, StepMetrics, Summary
from windlass.text import Text


class RunOptions(Protocol):
    """What a run needs of `TrainOptions`."""

    @property
    def steps(self) -> int: ...
    @property
    def resume(self) -> bool: ...
    @property
    def save_every(self) -> int | None: ...


class TrainingRun:
    """One rank's part in a run."""

    def __init__(
        self, options: RunOptions, engine: Engine, shape: ModelShape, text: Text, folder: RunFolder, seed: int
    ) -> None:
        self.options, self.engine, self.shape, self.text, self.seed = options, engine, shape, text, seed
        self.folder = folder
        self.writes = engine.rank == 0
        self.rows: list[dict[str, Any]] = []
        self.first_step = 0

    def run(self) -> Summary:
        engine, options = self.engine, self.options
        resumed = options.resume and self.folder.has_checkpoint
        if resumed:
            engine.load_checkpoint(self.folder.checkpoints)
            self.first_step = engine.global_steps + engine.skipped_steps
        engine.accelerator.seed(self.seed + self.first_step)
        if self.writes:
            self.rows = self.folder.start(self.first_step)
            self.folder.write_json("config.json", engine.config.resolved())
            self.folder.write_json("plan.json", engine.plan.to_json())
            print("\n".join(self._introduction(resumed)), flush=True)
        steps_done = self._train()
        stopped = steps_done < options.steps
        if steps_done > self.first_step:
            engine.save_checkpoint(self.folder.checkpoints, f"step{steps_done}")
        summary = self._summarize(steps_done, None if stopped else self._evaluate())
        if self.writes:
            self._write(summary)
        if stopped:
            raise Interrupted(
                f"stopped after step {steps_done} of {options.steps}, which is kept in {self.folder.path}; "
                "the same command with --resume goes on"
            )
        return summary

    def _train(self) -> int:
        """Run the steps that are left; return how many have been done since the very first."""
        progress = show_progress(self.engine.rank, self.first_step, self.options.steps)
        save_every = self.options.save_every
        try:
            with _stop_requests() as requests:
                for step in range(self.first_step, self.options.steps):
                    metrics, stop = self._step(step, bool(requests))
                    if self.writes:
                        self.rows.append(self.folder.add(metrics))
                        progress.update(self.rows[-1])
                    if stop:
                        return step + 1
                    if save_every and (step + 1) % save_every == 0 and step + 1 < self.options.steps:
                        self.engine.save_checkpoint(self.folder.checkpoints, f"step{step + 1}")
        finally:
            progress.close()
        return max(self.first_step, self.options.steps)

    def _step(self, step: int, stop: bool) -> tuple[StepMetrics, bool]:
        """One optimizer step; whether any rank wants to stop after it."""
        engine, config = self.engine, self.engine.config
        start, lr, skipped = time.perf_counter(), engine.lr, engine.skipped_steps
        if stop:
            engine.request_stop()
        for micro_step in range(config.gradient_accumulation_steps):
            ids, next_ids = self.text.rank_samples(
                self.seed,
                step,
                micro_step,
                rank=engine.rank,
                num_ranks=engine.num_ranks,
                micro_batch=config.train_micro_batch_size_per_gpu,
                micro_steps=config.gradient_accumulation_steps,
            )
            engine.backward(engine(ids, next_ids))
        engine.step()
        assert engine.loss is not None
        seconds = time.perf_counter() - start
        metrics = StepMetrics(
            step=step + 1,
            loss=engine.loss,
            grad_norm=engine.grad_norm,
            lr=lr,
            tokens_per_s=config.train_batch_size * self.shape.sequence_length / seconds,
            step_ms=seconds * 1e3,
            loss_scale=engine.loss_scale,
            skipped=engine.skipped_steps > skipped,
        )
        return metrics, engine.stop_requested

    def _evaluate(self) -> float:
        """The mean loss on the held-out sequences, the same for any number of ranks."""
        engine = self.engine
        ids, next_ids = self.text.evaluation_samples()
        rows = engine.config.train_micro_batch_size_per_gpu
        own = list(range(engine.rank, len(ids), engine.num_ranks))
        most = -(-len(ids) // engine.num_ranks)  # every rank makes as many calls as the one with the most sequences
        total: torch.Tensor | float = 0.0
        engine.eval()
        with torch.no_grad():
            for start in range(0, most, rows):
                batch = own[start : start + rows]
                padded = batch + [0] * (min(rows, most - start) - len(batch))
                logits = engine(ids[padded]).float()
                targets = next_ids[padded].to(logits.device)
                losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(dim=1)
                total = total + losses[: len(batch)].sum()
        engine.train()
        assert isinstance(total, torch.Tensor)
        return engine.mean_over_ranks(total * (engine.num_ranks / len(ids)))

    def _introduction(self, resumed: bool) -> list[str]:
        engine, config = self.engine, self.engine.config
        lines = [
            f"{self.shape.name}: {self.shape.num_parameters:,} parameters on {engine.num_ranks} "
            f"rank{'s' if engine.num_ranks > 1 else ''} of {_family(engine.accelerator)}, {engine.plan.precision}, "
            f"ZeRO stage {engine.plan.stage}, {_display_name(config.optimizer.type)}, plan {engine.plan.hash}",
            f"{config.train_batch_size} x {self.shape.sequence_length} bytes per step of {self.text.source} "
            f"({len(self.text.training):,} bytes, {len(self.text.held_out):,} more held out), into {self.folder.path}",
        ]
        if engine.plan.muon is not None:
            numel = sum(one.numel for one in engine.plan.muon.each)
            lines.append(
                f"Muon orthogonalises {engine.plan.muon.count} matrices of {numel:,} parameters, AdamW updates the rest"
            )
        if resumed:
            lines.append(f"resumed after step {self.first_step} of {self.options.steps}")
        elif self.options.resume:
            lines.append("there is no checkpoint to resume from, so this starts at the first step")
        return lines

    def _summarize(self, steps_done: int, held_out: float | None) -> Summary:
        engine = self.engine
        speeds = [row["tokens_per_s"] for row in self.rows if row["step"] > self.first_step]
        memory = {place.value: stats for place, stats in _memory(engine.accelerator)}
        return Summary(
            model=self.shape.name,
            optimizer=engine.config.optimizer.type,
            parameters=self.shape.num_parameters,
            steps=steps_done,
            steps_wanted=self.options.steps,
            first_loss=self.rows[0]["loss"] if self.rows else None,
            final_loss=self.rows[-1]["loss"] if self.rows else None,
            held_out_loss=held_out,
            tokens_per_s=statistics.median(speeds[min(3, len(speeds) // 2) :]) if speeds else None,
            skipped_steps=engine.skipped_steps,
            num_ranks=engine.num_ranks,
            stage=engine.plan.stage,
            precision=engine.plan.precision,
            accelerator=engine.accelerator.name,
            peak_bytes={place: asdict(stats.peak) for place, stats in memory.items()},
            used_bytes={place: asdict(stats.used) for place, stats in memory.items()},
            counters=engine.accelerator.counters.snapshot(),
            plan_hash=engine.plan.hash,
            text={"source": self.text.source, "digest": self.text.digest},
            seed=self.seed,
            versions={
                "windlass": windlass.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            config=engine.config.resolved(),
        )

    def _write(self, summary: Summary) -> None:
        """The last files of a run, and what a person wants to know of it."""
        from windlass.report import save_loss_plot

        title = (
            f"{summary.model} by {_display_name(summary.optimizer)} on {_family(self.engine.accelerator)}, "
            f"{summary.num_ranks} rank{'s' if summary.num_ranks > 1 else ''}, ZeRO stage {summary.stage}, "
            f"{summary.precision}"
        )
        save_loss_plot(self.folder.plot, self.rows, title=title, held_out=summary.held_out_loss)
        self.folder.write_json("summary.json", asdict(summary))
        print("\n".join(_conclusion(summary)) + f"\nsee {self.folder.plot}", flush=True)


def _conclusion(summary: Summary) -> list[str]:
    facts = []
    if summary.first_loss is not None and summary.final_loss is not None:
        facts.append(f"loss {summary.first_loss:.3f} -> {summary.final_loss:.3f} nats per byte")
    if summary.held_out_loss is not None:
        facts.append(f"held out {summary.held_out_loss:.3f}")
    if summary.tokens_per_s is not None:
        facts.append(f"{summary.tokens_per_s:,.0f} tokens/s")
    if summary.skipped_steps:
        facts.append(f"{summary.skipped_steps} steps skipped")
    peaks = [
        f"{one['value'] / 2**20:,.0f} MiB on the {place}" for place, one in summary.peak_bytes.items() if one["value"]
    ]
    return [", ".join(facts), f"peak per rank {', '.join(peaks)}"] if peaks else [", ".join(facts)]


def _memory(accelerator: Accelerator) -> Iterator[tuple[Place, MemoryStats]]:
    """What each tier that the accelerator has held."""
    offered = {
        Place.DEVICE: True,
        Place.HOST: accelerator.capabilities.host_place,
        Place.DISK: accelerator.capabilities.disk_place,
    }
    for place, has_it in offered.items():
        if has_it:
            yield place, accelerator.memory.stats(place)


def _display_name(optimizer: str) -> str:
    return {"adam": "Adam", "adamw": "AdamW", "muon": "Muon"}[optimizer]


def _family(accelerator: Accelerator) -> str:
    """ "cuda" of "cuda:0": what all ranks share."""
    return accelerator.name.partition(":")[0]


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """The signals that asked this process to stop, in a list that fills while the block runs."""
    requests: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        requests.append(number)

    if threading.current_thread() is not threading.main_thread():  # signals go to the main thread, which is not ours
        yield requests
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
