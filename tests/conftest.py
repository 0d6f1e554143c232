"""What every test gets: an environment that says nothing to windlass, and no rank process left behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

from windlass.conformance import rank_pool

# Set before anything imports torch: many processes share the machine's cores while the suite runs.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Forget the caller's choices (accelerator, ranks, rendezvous): a test says itself what it depends on."""
    launcher = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    for name in [name for name in os.environ if name.startswith("WINDLASS_") or name in launcher]:
        del os.environ[name]
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have their parent's
        folder = tempfile.TemporaryDirectory(prefix="windlass-cache-")
        config.add_cleanup(folder.cleanup)
        os.environ["XDG_CACHE_HOME"] = folder.name  # nothing depends on what was measured in earlier runs


@pytest.fixture(scope="session", autouse=True)
def _stop_ranks_at_the_end() -> Iterator[None]:
    yield
    rank_pool.stop_pool()
