"""What was saved on some ranks at some stage loads on others, to the bit, and training goes on unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import saving
from windlass.conformance.rank_pool import run_ranks

BF16: dict[str, Any] = {"bf16": {"enabled": True}}
MUON: dict[str, Any] = {"optimizer": {"type": "Muon", "params": {"lr": 1e-2}}, "muon": {"ns_dtype": "fp32"}}
MUON_BF16: dict[str, Any] = {**BF16, **MUON, "muon": {"ns_dtype": "bf16", "momentum_dtype": "bf16"}}


@pytest.mark.parametrize("more", [{}, BF16, MUON_BF16], ids=["fp32", "bf16", "muon"])
@pytest.mark.parametrize(
    ("written", "read"),
    [((2, 1), (2, 1)), ((2, 3), (3, 0)), ((3, 0), (2, 2)), ((1, 2), (4, 3)), ((4, 3), (1, 1))],
    ids=lambda pair: f"{pair[0]}ranks-stage{pair[1]}",
)
def test_saved_state_loads_anywhere(
    tmp_path: Path, written: tuple[int, int], read: tuple[int, int], more: dict[str, Any]
) -> None:
    saved = run_ranks(saving.save, written[0], str(tmp_path), written[1], more)[0]
    run_ranks(saving.load, read[0], str(tmp_path), read[1], more, saved)


@pytest.mark.parametrize(
    ("stage", "more"),
    [(0, {}), (1, {}), (2, {}), (3, {}), (2, MUON), (3, MUON_BF16)],
    ids=["0", "1", "2", "3", "2-muon", "3-muon-bf16"],
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, stage: int, more: dict[str, Any]) -> None:
    saved = run_ranks(saving.save, 2, str(tmp_path), stage, more)[0]
    resumed = run_ranks(saving.load, 2, str(tmp_path), stage, more, saved)[0]
    assert saving.same(resumed, run_ranks(saving.train_through, 2, stage, more)[0])


def test_another_optimizer_goes_on_with_the_weights(tmp_path: Path) -> None:
    """What it keeps begins at zero, and rank 0 says for how many parameters."""
    saved = run_ranks(saving.save, 2, str(tmp_path), 2, {})[0]
    loaded, told = run_ranks(saving.load_for_another_optimizer, 2, str(tmp_path), 3, MUON)[0]
    assert saving.same(loaded["weights"], saved["weights"])
    by_muon = [name for name, moments in loaded["moments"].items() if "momentum" in moments]
    assert by_muon
    assert not any(loaded["moments"][name]["momentum"].any() for name in by_muon)
    assert {loaded["moments"][name]["step"] for name in by_muon} == {0}
    rest = [name for name in saved["moments"] if name not in by_muon]
    assert saving.same({n: loaded["moments"][n] for n in rest}, {n: saved["moments"][n] for n in rest})
    assert told == [
        f"checkpoint {tmp_path}/step3 holds no state of this optimizer for {len(by_muon)} parameters, {by_muon[0]} "
        "first: it begins anew for them"
    ]


def test_bad_checkpoints_are_named_and_change_nothing(tmp_path: Path) -> None:
    run_ranks(saving.expect_error, 2, str(tmp_path), "Tied", "there is no checkpoint in")
    run_ranks(saving.save, 2, str(tmp_path), 1, {})
    run_ranks(saving.expect_error, 2, str(tmp_path), "TinyPieces", r"does not fit the model: it lacks .*none")
    data = tmp_path / "step3" / "rank00001.bin"
    content = bytearray(data.read_bytes())
    content[200] ^= 1
    data.write_bytes(content)
    run_ranks(saving.expect_error, 2, str(tmp_path), "Tied", "is damaged: .* does not have the checksum")


def test_layout_is_raw_bytes_and_one_manifest(tmp_path: Path) -> None:
    """The files can be read by anyone with the manifest: no pickle, aligned, addressed by boxes."""
    import numpy as np

    saved = run_ranks(saving.save, 3, str(tmp_path), 3, {})[0]
    assert (tmp_path / "latest").read_text() == "step3"
    folder = tmp_path / "step3"
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json", "rank00000.bin", "rank00001.bin", "rank00002.bin",
    ]  # fmt: skip
    manifest = json.loads((folder / "manifest.json").read_text())
    whole = np.zeros(saved["weights"]["head.weight"].numel(), dtype=np.float32)
    for entry in manifest["tensors"]:
        assert entry["offset"] % 128 == 0
        if (entry["name"], entry["key"]) == ("embedding.weight", "weight"):
            raw = (folder / entry["file"]).read_bytes()[entry["offset"] : entry["offset"] + entry["length"]]
            whole[entry["start"] : entry["stop"]] = np.frombuffer(raw, dtype="<f4")
    assert (whole == saved["weights"]["embedding.weight"].numpy().reshape(-1)).all()
