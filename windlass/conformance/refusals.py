"""What a refusal must say, and when: the negative tests of the suite."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from windlass.accelerator.errors import Unsupported, WindlassError

_ADVICE = re.compile(r"\b(use|instead)\b", re.IGNORECASE)


@contextmanager
def refused(what: str) -> Iterator[None]:
    """The block raises `Unsupported` with a sentence that names `what` and says what to do instead."""
    with pytest.raises(WindlassError) as caught:
        yield
    assert type(caught.value) is Unsupported, f"wanted Unsupported, got {type(caught.value).__name__}: {caught.value}"
    sentence = str(caught.value)
    assert what in sentence, f"the sentence must name {what!r}: {sentence}"
    assert _ADVICE.search(sentence), f"the sentence must say what to use instead: {sentence}"
