"""Training text: what it refuses, and that samples follow from the seed and the step alone."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest
import torch

from windlass.text import EVALUATION_SEQUENCES, Text, TextError, load_text


@pytest.fixture
def numbered(tmp_path: Path) -> Text:
    """Bytes 0 to 250 again and again, so that a byte tells its position modulo 251."""
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(251)) * 40)
    return load_text(path, 16)


def test_default_text_is_the_help_of_python_without_repeats() -> None:
    text = load_text(None, 128)
    content = text.training.tobytes() + text.held_out.tobytes()
    assert len(content) > 300_000
    paragraphs = content.decode().split("\n\n")
    # what one topic ends with and the next begins with may join into a new pair of empty lines, never into new words
    assert len(set(paragraphs)) > 0.99 * len(paragraphs)
    assert pydoc_data.topics.topics["assert"].split("\n\n")[1] in paragraphs


def test_held_out_is_the_end_and_nothing_is_lost(tmp_path: Path) -> None:
    content = bytes(range(200)) * 50
    (tmp_path / "text.bin").write_bytes(content)
    text = load_text(tmp_path / "text.bin", 16)
    assert text.training.tobytes() + text.held_out.tobytes() == content
    assert len(text.held_out) == len(content) // 20


def test_targets_are_the_next_bytes(numbered: Text) -> None:
    for ids, targets in (numbered.samples(1, 0, 32), numbered.evaluation_samples()):
        assert ids.dtype is targets.dtype is torch.int64
        assert ids.shape == targets.shape
        assert ids.shape[1] == 16
        assert torch.equal(targets, (ids + 1) % 251)


def test_samples_reach_every_place_of_the_training_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(range(100)))
    text = load_text(tmp_path / "text", 16)  # 17 bytes are held out: 83 to train on, 67 places to start
    ids, targets = text.samples(1, 0, 2000)
    assert sorted(set(ids[:, 0].tolist())) == list(range(67))
    assert targets.max() == 82


def test_samples_follow_from_seed_and_step(numbered: Text) -> None:
    first = numbered.samples(1, 7, 8)[0]
    assert torch.equal(first, numbered.samples(1, 7, 8)[0])
    assert not torch.equal(first, numbered.samples(1, 8, 8)[0])
    assert not torch.equal(first, numbered.samples(2, 7, 8)[0])


@pytest.mark.parametrize(("num_ranks", "micro_batch", "micro_steps"), [(1, 12, 1), (2, 3, 2), (4, 1, 3), (3, 4, 1)])
def test_ranks_and_micro_steps_share_the_same_batch(
    numbered: Text, num_ranks: int, micro_batch: int, micro_steps: int
) -> None:
    parts = [
        numbered.rank_samples(
            5,
            3,
            micro_step,
            rank=rank,
            num_ranks=num_ranks,
            micro_batch=micro_batch,
            micro_steps=micro_steps,
        )
        for micro_step in range(micro_steps)
        for rank in range(num_ranks)
    ]
    ids, targets = numbered.samples(5, 3, 12)
    assert torch.equal(torch.cat([part[0] for part in parts]), ids)
    assert torch.equal(torch.cat([part[1] for part in parts]), targets)


def test_evaluation_never_sees_training_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"t" * 9500 + b"h" * 500)
    text = load_text(tmp_path / "text", 16)
    ids, targets = text.evaluation_samples()
    assert len(ids) == min(EVALUATION_SEQUENCES, 499 // 16)
    assert set(ids.flatten().tolist()) == set(targets.flatten().tolist()) == {ord("h")}
    assert set(text.samples(0, 0, 500)[1].flatten().tolist()) == {ord("t")}


def test_folder_is_joined_in_order_of_name(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "b.txt").write_text("b" * 50)
    (tmp_path / "a.txt").write_text("a" * 50)
    (tmp_path / "inner" / "c.txt").write_text("c" * 50)
    (tmp_path / "notes.md").write_text("not this")
    text = load_text(tmp_path, 16)
    assert text.training.tobytes() + text.held_out.tobytes() == b"a" * 50 + b"\n" + b"b" * 50 + b"\n" + b"c" * 50


def test_digest_tells_texts_apart(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"x" * 100)
    (tmp_path / "two").write_bytes(b"x" * 99 + b"y")
    assert load_text(tmp_path / "one", 16).digest != load_text(tmp_path / "two", 16).digest


def test_missing_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"missing\.txt: there is no such file or folder, give the path"):
        load_text(tmp_path / "missing.txt", 16)


def test_folder_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"the folder holds no \.txt file"):
        load_text(tmp_path, 16)


def test_empty_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(TextError, match="the file is empty, give one that holds text"):
        load_text(tmp_path / "empty.txt", 16)


@pytest.mark.parametrize(("size", "enough"), [(33, False), (34, True)])
def test_text_must_hold_two_sequences(tmp_path: Path, size: int, enough: bool) -> None:
    (tmp_path / "short.txt").write_bytes(b"x" * size)
    if enough:
        text = load_text(tmp_path / "short.txt", 16)
        assert (len(text.training), len(text.held_out), len(text.evaluation_samples()[0])) == (17, 17, 1)
        assert text.samples(0, 0, 4)[0].shape == (4, 16)
    else:
        with pytest.raises(TextError, match="33 bytes are too few, 34 are needed"):
            load_text(tmp_path / "short.txt", 16)
