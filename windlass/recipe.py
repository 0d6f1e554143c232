"""The built-in training job: a GPT on text, through the public API alone. This is what each rank of it runs."""

from __future__ import annotations

import difflib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import windlass
from windlass.config import Config, configured_accelerator, load_config
from windlass.config_source import read_source
from windlass.launch import Interrupted, end_with_parent, report_error
from windlass.models import build_model, find_shape
from windlass.run_folder import RunFolder, Summary
from windlass.text import load_text


@dataclass(frozen=True)
class TrainOptions:
    """What `windlass train` was asked for, as plain values that travel to the ranks."""

    out: str
    config: str | None = None  # path of a JSON file; None: the model's own defaults
    model: str = "tiny"
    steps: int = 200
    accelerator: str | None = None
    text: str | None = None  # path; None: the text that Python ships
    seed: int | None = None  # None: the config's
    resume: bool = False
    save_every: int | None = None  # steps between checkpoints; None: only at the end
    optimizer: str | None = None  # "adamw" or "muon" in any case; None: the resumed run's, the config's, AdamW


@dataclass(frozen=True)
class _Defaults:
    """Settings that were tried for a size: see `default_config`."""

    sequences: int  # per optimizer step, over all ranks
    lr: float  # of AdamW
    muon_lr: float  # of Muon, for the matrices
    adam_lr: float  # of AdamW beside Muon, for the rest


_DEFAULTS = {
    "nano": _Defaults(sequences=16, lr=2e-3, muon_lr=16e-3, adam_lr=8e-3),
    "tiny": _Defaults(sequences=16, lr=1.5e-3, muon_lr=6e-3, adam_lr=6e-3),
    "small": _Defaults(sequences=16, lr=1e-3, muon_lr=2e-3, adam_lr=2e-3),
    "gpt2": _Defaults(sequences=8, lr=6e-4, muon_lr=1.2e-3, adam_lr=1.2e-3),
}
OPTIMIZERS = ("adamw", "muon")
"""What the recipe has settings for; a configuration may name others."""


def default_config(
    model: str, steps: int, num_ranks: int, matmul_dtypes: Sequence[str] = (), *, optimizer: str = "adamw"
) -> dict[str, Any]:
    """The configuration of a run that was given none: bf16 where its products run at native speed, ZeRO stage 2,
    AdamW or Muon with a tenth of the steps as warmup (at least 10, of a short run half) and then a cosine.

    The samples of a step are the same for any number of ranks that divides them.
    """
    fast = "bfloat16" in matmul_dtypes
    # Nothing is left to measurements, so that a run follows from its command, and `windlass plan` plans the same.
    rules = {"ns_dtype": "bf16" if fast else "fp32", "ns_method": "standard", "scale": "rms"}
    muon = {"muon": rules} if optimizer == "muon" else {}
    return {
        "train_micro_batch_size_per_gpu": default_micro_batch(model, num_ranks),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": fast},
        "zero_optimization": {"stage": 2},
        "optimizer": default_optimizer(model, optimizer),
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": max(2, steps),
                "warmup_num_steps": max(2, min(steps // 2, 10), steps // 10),
                "warmup_type": "linear",
                "cos_min_ratio": 0.1,
            },
        },
        **muon,
    }


def default_optimizer(model: str, optimizer: str) -> dict[str, Any]:
    """The section `optimizer` for a size, "adamw" or "muon"."""
    defaults = _DEFAULTS[model]
    shared = {"betas": [0.9, 0.95], "weight_decay": 0.1}
    if optimizer == "muon":
        rates = {"lr": defaults.muon_lr, "muon_lr": defaults.muon_lr, "adam_lr": defaults.adam_lr}
        return {"type": "Muon", "params": {**rates, **shared}}
    return {"type": "AdamW", "params": {"lr": defaults.lr, **shared}}


def default_micro_batch(model: str, num_ranks: int) -> int:
    """Sequences per rank where a configuration names no batch size."""
    return max(1, _DEFAULTS[model].sequences // num_ranks)


def resolve_config(options: TrainOptions, num_ranks: int, matmul_dtypes: Sequence[str] = ()) -> Config:
    """The configuration in full; raises ConfigError, or ValueError for optimizers that contradict each other."""

    def load(source: str | dict[str, Any]) -> Config:
        return load_config(source, num_ranks, default_micro_batch=default_micro_batch(options.model, num_ranks))

    asked, begun = _asked_optimizer(options), _begun_optimizer(options)
    if None not in (asked, begun) and asked != begun:
        raise ValueError(
            f"--optimizer {options.optimizer}: the run in {options.out} was begun with {begun}, leave it out to go on "
            "with that or name another folder"
        )
    wanted = asked or begun
    if options.config is None:
        if wanted not in (None, *OPTIMIZERS):
            raise ValueError(
                f"--resume: the run in {options.out} was begun with {wanted}, which only a configuration can ask for; "
                "give the one it was begun with"
            )
        return load(default_config(options.model, options.steps, num_ranks, matmul_dtypes, optimizer=wanted or "adamw"))
    config = load(options.config)
    if wanted in (None, config.optimizer.type):
        return config
    _, content = read_source(options.config)
    section = content.get("optimizer") or {}
    if isinstance(section, Mapping) and section.get("type") in (None, "auto") and wanted in OPTIMIZERS:
        return load({**content, "optimizer": default_optimizer(options.model, wanted)})
    who = f"--optimizer {options.optimizer}" if asked else f"the run in {options.out}, begun with {begun},"
    raise ValueError(
        f"{who} contradicts {options.config}, which asks for {config.optimizer.type}: change its optimizer.type, or "
        f"{'leave out the option' if asked else 'name another folder'}"
    )


def _asked_optimizer(options: TrainOptions) -> str | None:
    """What the command line says, in lower case; raises ValueError for a name that is none."""
    if options.optimizer is None:
        return None
    name = options.optimizer.lower()
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ", or name another in a configuration"
        raise ValueError(f"--optimizer must be adamw or muon, got {options.optimizer!r}{hint}")
    return name


def _begun_optimizer(options: TrainOptions) -> str | None:
    """With what the run that is to be resumed was begun; None where there is nothing to go on with."""
    folder = RunFolder(Path(options.out))
    return folder.read_optimizer() if options.resume and folder.has_checkpoint else None


def check_options(options: TrainOptions, num_ranks: int) -> Config:
    """Find what is wrong with the options before any rank is started; raises ValueError in one sentence."""
    shape = find_shape(options.model)
    load_text(None if options.text is None else Path(options.text), shape.sequence_length)
    folder = RunFolder(Path(options.out))
    if folder.has_checkpoint and not options.resume:
        raise ValueError(
            f"--out {folder.path}: the folder holds the checkpoint of a run, go on with it by --resume or name another"
        )
    return resolve_config(options, num_ranks)


def make_folder(options: TrainOptions) -> None:
    """Make the folder of the run, if it is not there; raises ValueError in one sentence."""
    try:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {options.out}: the folder cannot be made, {error.strerror}; name another") from error


def train(options: TrainOptions) -> Summary:
    """Train as one of the ranks, or as the only one; every rank calls this with the same options.

    A run continues from its last checkpoint only when `resume` says so. SIGINT and SIGTERM end it after the step that
    is under way, with a checkpoint: then Interrupted is raised on every rank.
    """
    from windlass.training_run import TrainingRun

    shape = find_shape(options.model)
    text = load_text(None if options.text is None else Path(options.text), shape.sequence_length)
    asked = configured_accelerator(options.config)
    accelerator = windlass.open_accelerator(options.accelerator, config_name=asked)
    try:
        config = resolve_config(options, accelerator.collectives.world.size, accelerator.capabilities.matmul_dtypes)
        seed = config.seed if options.seed is None else options.seed
        torch.manual_seed(seed)  # the same weights on every rank
        model = build_model(options.model)
        engine = windlass.initialize(model, config, accelerator=accelerator)
        try:
            return TrainingRun(options, engine, shape, text, RunFolder(Path(options.out)), seed).run()
        finally:
            engine.close()
    finally:
        accelerator.close()


def run_as_rank(options: TrainOptions) -> int:
    """Train, with every failure told in one sentence; the exit code of the process."""
    show_messages()
    try:
        train(options)
    except KeyboardInterrupt:
        report_error(Interrupted("stopped before the first step, there is nothing to keep"))
    except Exception as error:  # whatever it was, the launcher and its user hear of it
        report_error(error)
    else:
        return 0
    return 1


def start_as_rank() -> None:
    """The main program of a rank that `windlass train` has started; the options are its argument, as JSON."""
    end_with_parent()
    sys.exit(run_as_rank(TrainOptions(**json.loads(sys.argv[1]))))


class _Stderr(logging.Handler):
    """Prints messages to whatever sys.stderr is at the time: a progress bar puts itself in between."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"windlass: {record.getMessage()}", file=sys.stderr)


def show_messages() -> None:
    """Print what windlass logs, in this process, to stderr."""
    logger = logging.getLogger("windlass")
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())
        logger.setLevel(logging.INFO)
        logger.propagate = False
