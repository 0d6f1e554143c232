"""Level 2: publishing is a promise to those who fetch afterwards, also by a rank that is late."""

from __future__ import annotations

import pytest

from windlass.conformance import publish_workers as workers
from windlass.conformance.plugin import Run
from windlass.conformance.requirements import requires


@requires(
    level=2,
    must="A fetch after publish() brings what every rank had written before it published, however late one was.",
    needs=lambda ranks: f"ranks:{ranks}",
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_late_publication(run: Run, ranks: int) -> None:
    run(workers.publish_late, ranks)
