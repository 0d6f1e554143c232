"""Training text as bytes: what every CPython ships, or the user's own, and the samples of each step.

A step's samples follow from the seed and the step alone. No position is kept, so a resumed run goes on with the
samples it would have had, and a run on another number of ranks sees the same ones.
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DEFAULT_SOURCE = "pydoc_data.topics"
HELD_OUT_SHARE = 0.05
"""The part of the text, at its end, that is never trained on."""

EVALUATION_SEQUENCES = 32
"""The sequences on which a model is evaluated, spread evenly over the held-out text (fewer where it is short)."""


class TextError(ValueError):
    """A text that cannot be trained on: what is wrong with it and what to give instead."""


@dataclass(frozen=True)
class Text:
    """A text cut into what is trained on and what is held out, each longer than one sequence."""

    source: str
    training: npt.NDArray[np.uint8] = field(repr=False)
    held_out: npt.NDArray[np.uint8] = field(repr=False)
    sequence_length: int

    @property
    def digest(self) -> str:
        """Equal for equal text; the default text differs a little between versions of Python."""
        return hashlib.sha256(self.training.tobytes() + self.held_out.tobytes()).hexdigest()[:16]

    def samples(
        self, seed: int, step: int, batch: int
    ) -> tuple[Tensor, Tensor]:  # ids and next ids, (batch, sequence_length) int64
        """The whole batch of an optimizer step, over all ranks and micro-steps."""
        last = len(self.training) - self.sequence_length
        return self._cut(self.training, np.random.default_rng((seed, step)).integers(last, size=batch))

    def rank_samples(
        self,
        seed: int,
        step: int,
        micro_step: int,
        *,
        rank: int,
        num_ranks: int,
        micro_batch: int,  # samples per rank and micro-step
        micro_steps: int,  # micro-steps per optimizer step
    ) -> tuple[Tensor, Tensor]:  # ids and next ids, (micro_batch, sequence_length) int64
        """The rows of the step's batch that one rank takes in one micro-step."""
        ids, next_ids = self.samples(seed, step, num_ranks * micro_batch * micro_steps)
        start = (micro_step * num_ranks + rank) * micro_batch
        return ids[start : start + micro_batch], next_ids[start : start + micro_batch]

    def evaluation_samples(self) -> tuple[Tensor, Tensor]:  # ids and next ids, (sequences, sequence_length) int64
        """The held-out sequences, always the same."""
        room = len(self.held_out) - 1
        count = min(EVALUATION_SEQUENCES, room // self.sequence_length)
        starts = np.linspace(0, room - self.sequence_length, count).astype(np.int64)
        return self._cut(self.held_out, starts)

    def _cut(self, text: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        rows = text[starts[:, None] + np.arange(self.sequence_length + 1)]
        ids = torch.from_numpy(rows.astype(np.int64))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def load_text(
    path: Path | None,  # a file, a folder whose .txt files are joined in order of name, or None: the default text
    sequence_length: int,  # bytes in a sample
) -> Text:
    """Read a text and hold out its end.

    Raises TextError if there is no such text, if it cannot be read, or if it is too short to give one sequence for
    training and another to hold out.
    """
    source, content = (DEFAULT_SOURCE, _read_default()) if path is None else (str(path), _read(path))
    needed = sequence_length + 1  # a sequence and the byte that follows it
    if len(content) < 2 * needed:
        raise TextError(
            f"text {source}: {len(content)} bytes are too few, {2 * needed} are needed to train on one sequence of "
            f"{sequence_length} bytes and hold out another; give a longer text"
        )
    data = np.frombuffer(content, dtype=np.uint8)
    held_out = max(needed, int(len(data) * HELD_OUT_SHARE))
    return Text(source, data[:-held_out], data[-held_out:], sequence_length)


def _read_default() -> bytes:
    """The help texts on Python's own language: plain English prose with some code in it.

    Many topics repeat each other. Each paragraph is taken once, or what is held out would be in the training text too.
    They come in reverse order of name: the last topics are long tables, far easier than the rest, the first are prose.
    """
    topics: dict[str, str] = importlib.import_module(DEFAULT_SOURCE).topics
    paragraphs = (paragraph for name in sorted(topics, reverse=True) for paragraph in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs)).encode()


def _read(path: Path) -> bytes:
    if not path.exists():
        raise TextError(f"text {path}: there is no such file or folder, give the path of a text or leave out --text")
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise TextError(f"text {path}: the folder holds no .txt file, give a file or a folder of .txt files")
    try:
        content = b"\n".join(file.read_bytes() for file in files)
    except OSError as error:
        raise TextError(f"text {path}: {error.filename} cannot be read, {error.strerror}") from error
    if not content.strip():
        raise TextError(f"text {path}: the {'folder' if path.is_dir() else 'file'} is empty, give one that holds text")
    return content
