"""The process's environment as plain data: the one place of the project that reads it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

DEFAULT_TIMEOUT_SECONDS: Final = 600.0
DEFAULT_MASTER: Final = ("127.0.0.1", 29500)


@dataclass(frozen=True)
class Environment:
    """Where this process stands in its job, as torchrun says it, and what the user set for windlass."""

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    local_num_ranks: int = 1
    """Ranks on this host; without a launcher that says so, all of them."""
    master_address: str = DEFAULT_MASTER[0]
    master_port: int = DEFAULT_MASTER[1]
    store_served: bool = False
    """TORCHELASTIC_USE_AGENT_STORE: the launcher serves the store at the master address; else rank 0 does."""
    attempt: int = 0
    """TORCHELASTIC_RESTART_COUNT: how often the launcher has started the ranks again."""
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    """WINDLASS_TIMEOUT: how long a rank waits for another before it gives up."""
    accelerator: str | None = None
    """WINDLASS_ACCELERATOR: "cpu", "cuda:1"; None leaves the choice open."""
    backends: tuple[str, ...] | None = None
    """WINDLASS_BACKENDS: the backends that may be loaded at all; None allows every one."""
    simulation: str = ""
    """WINDLASS_SIM: what the simulated accelerator simulates, as `windlass.backends.sim.settings` reads it."""
    tpu_library_path: str = ""
    """TPU_LIBRARY_PATH: the library that drives TPUs, where it is not the package libtpu."""
    pjrt_device: str = ""
    """PJRT_DEVICE: the client through which torch_xla reaches its device, CPU or TPU; empty: it is chosen."""
    visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES: the GPUs that the driver shows to this process, "" for none; None: all."""
    cache_home: str = ""
    """XDG_CACHE_HOME: where programs keep what they can make again; empty: ~/.cache."""
    debug: bool = False
    """WINDLASS_DEBUG: whether to make costly checks, such as comparing the ranks' programs before they are run."""


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Read `variables`, by default those of the process; a malformed value raises ValueError naming its variable."""
    source = os.environ if variables is None else variables
    for one, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if one in source and other not in source:
            raise ValueError(f"{one} is set and {other} is not; set both, as torchrun does, or neither")
    num_ranks = _whole_number(source, "WORLD_SIZE", 1, least=1)
    rank = _whole_number(source, "RANK", 0, most=num_ranks - 1)
    local_num_ranks = _whole_number(source, "LOCAL_WORLD_SIZE", num_ranks, least=1, most=num_ranks)
    return Environment(
        rank=rank,
        num_ranks=num_ranks,
        local_rank=_whole_number(source, "LOCAL_RANK", rank % local_num_ranks, most=local_num_ranks - 1),
        local_num_ranks=local_num_ranks,
        master_address=source.get("MASTER_ADDR") or DEFAULT_MASTER[0],
        master_port=_whole_number(source, "MASTER_PORT", DEFAULT_MASTER[1], least=1, most=65535),
        store_served=source.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_whole_number(source, "TORCHELASTIC_RESTART_COUNT", 0),
        timeout_seconds=_seconds(source, "WINDLASS_TIMEOUT", DEFAULT_TIMEOUT_SECONDS),
        accelerator=source.get("WINDLASS_ACCELERATOR", "").strip() or None,
        backends=_names(source, "WINDLASS_BACKENDS"),
        simulation=source.get("WINDLASS_SIM", "").strip(),
        tpu_library_path=source.get("TPU_LIBRARY_PATH", "").strip(),
        pjrt_device=source.get("PJRT_DEVICE", "").strip(),
        visible_devices=source.get("CUDA_VISIBLE_DEVICES"),
        cache_home=source.get("XDG_CACHE_HOME", ""),
        debug=_switch(source, "WINDLASS_DEBUG"),
    )


def prefer_variable(name: str, value: str) -> None:
    """Set a variable that a vendor's package reads, unless the user has set it."""
    if not os.environ.get(name):
        os.environ[name] = value


def _whole_number(
    source: Mapping[str, str], name: str, default: int, *, least: int = 0, most: int | None = None
) -> int:
    text = source.get(name)
    if text is None:
        return default
    wanted = f"a whole number from {least}" + ("" if most is None else f" to {most}")
    try:
        value = int(text)
    except ValueError as error:
        raise ValueError(f"{name} must be {wanted}, got {text!r}") from error
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} must be {wanted}, got {text!r}")
    return value


def _seconds(source: Mapping[str, str], name: str, default: float) -> float:
    text = source.get(name)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a number of seconds above 0, got {text!r}") from error
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a number of seconds above 0, got {text!r}")
    return value


def _switch(source: Mapping[str, str], name: str) -> bool:
    text = source.get(name, "").strip()
    if text not in ("", "0", "1"):
        raise ValueError(f"{name} must be 1 or 0, got {text!r}")
    return text == "1"


def _names(source: Mapping[str, str], name: str) -> tuple[str, ...] | None:
    text = source.get(name, "").strip()
    if not text:
        return None
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise ValueError(f"{name} must be names separated by commas, got {text!r}")
    return names
