"""One JSON file or dict, checked and completed: DeepSpeed's `ds_config.json` is understood as it is.

    config = load_config("ds_config.json", num_ranks=4)
    config.train_micro_batch_size_per_gpu, config.zero_optimization.stage, config.optimizer.params.lr

Reading is `config_source`, sorting the keys by what windlass does with them `config_keys` (over the tables of
`deepspeed_keys` and `config_absent`), types and ranges `config_models`, the batch triangle `config_batch`, optimizer
and schedule `config_optimizer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from windlass.config_batch import resolve_batch_sizes
from windlass.config_errors import ConfigError, explain, quote
from windlass.config_keys import SortedKeys, sort_keys
from windlass.config_models import Config, GivenConfig
from windlass.config_optimizer import resolve_muon, resolve_optimizer, resolve_scheduler
from windlass.config_source import read_source
from windlass.deepspeed_keys import DONE, NOT_YET, REFUSED

__all__ = ["Config", "ConfigError", "configured_accelerator", "load_config"]


def load_config(
    source: str | Path | Mapping[str, object] | None,  # a dict, the path of a JSON file, or None for all defaults
    num_ranks: int | None,  # data-parallel ranks; None: not known yet, as many as the file implies, else 1
    *,
    default_micro_batch: int | None = None,  # samples per rank and micro-batch when no key decides; None: 1
) -> Config:
    """Read, check and complete a configuration for a number of ranks.

    The result has every default and every derived size filled in, and in `messages` the lines that rank 0 should
    print. Raises ConfigError, one line that tells all that is wrong with the file.
    """
    where, content = read_source(source)
    keys = sort_keys(content)
    given = None
    try:
        given = GivenConfig.model_validate(keys.done)
    except ValidationError as error:
        keys.problems.extend(explain(found) for found in error.errors())
    config = None
    if num_ranks is not None and num_ranks < 1:
        keys.problems.append(f"the number of ranks must be at least 1, got {num_ranks}")
    elif given is not None:
        config = _complete(given, keys, num_ranks or _implied_ranks(given), default_micro_batch)
    if config is None:
        raise ConfigError(f"{where}: {'; '.join(keys.problems)}")
    return config.model_copy(update={"messages": (*keys.messages(), *_auto_line(keys.auto, config))})


def _implied_ranks(given: GivenConfig) -> int:
    """The number of ranks that fits the file, where it says so; 1 fits all others."""
    train, micro = given.train_batch_size, given.train_micro_batch_size_per_gpu
    steps = given.gradient_accumulation_steps
    if train is not None and micro is not None and steps is not None:
        return max(1, train // (micro * steps))
    return given.data_parallel_size or 1


def configured_accelerator(source: str | Path | Mapping[str, object] | None) -> str | None:
    """The accelerator that a configuration asks for: wanted before the rest can be resolved for a number of ranks."""
    _, content = read_source(source)
    name = content.get("accelerator")
    return name if isinstance(name, str) else None


def _complete(given: GivenConfig, keys: SortedKeys, num_ranks: int, default_micro_batch: int | None) -> Config | None:
    """Derive what the file leaves open; None if anything in it is wrong, with the reasons in `keys.problems`."""
    keys.problems.extend(_conflicts(given, num_ranks))
    scheduler = resolve_scheduler(given.scheduler, keys)
    optimizer = resolve_optimizer(given, scheduler, keys)
    try:
        sizes = resolve_batch_sizes(
            given.train_batch_size,
            given.train_micro_batch_size_per_gpu,
            given.gradient_accumulation_steps,
            num_ranks,
            default_micro_batch,
        )
    except ValueError as error:
        keys.problems.append(str(error))
        return None
    if keys.problems:
        return None
    shared = {name: getattr(given, name) for name in GivenConfig.model_fields if name in Config.model_fields}
    return Config(
        **{
            **shared,
            "train_batch_size": sizes.train,
            "train_micro_batch_size_per_gpu": sizes.micro,
            "gradient_accumulation_steps": sizes.steps,
            "num_ranks": num_ranks,
            "muon": resolve_muon(given),
            "optimizer": optimizer,
            "scheduler": scheduler,
        }
    )


def _conflicts(given: GivenConfig, num_ranks: int) -> list[str]:
    """Find what is wrong between keys that are each right."""
    problems = []
    if given.fp16.enabled and given.bf16.enabled:
        problems.append("fp16.enabled and bf16.enabled are both true, set one of them to false")
    if given.communication_data_type in ("fp16", "bf16"):
        problems.append(
            f"communication_data_type = {quote(given.communication_data_type)} is not done yet: "
            'remove it or set it to "fp32"'
        )
    if given.data_parallel_size not in (None, num_ranks):
        problems.append(
            f"data_parallel_size = {given.data_parallel_size} contradicts the number of ranks = {num_ranks}, "
            f"set it to {num_ranks} or remove it"
        )
    return problems


def _auto_line(paths: list[str], config: Config) -> list[str]:
    """Say in one line what became of every key that was left to windlass."""
    if not paths:
        return []
    resolved = config.resolved()
    return [f'info: "auto" is decided: {", ".join(f"{path} = {_decided(path, resolved)}" for path in paths)}']


def _decided(path: str, resolved: Mapping[str, object]) -> str:
    value: object = resolved
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            break
        value = value[part]
    else:
        return quote(value)
    if path in DONE:
        return quote(DONE[path].default)
    if path.startswith("scheduler."):
        return "the schedule's default"
    absent = any(key == path or key.startswith(f"{path}.") for key in (*NOT_YET, *REFUSED))
    return "off" if absent else "left to the plan"
