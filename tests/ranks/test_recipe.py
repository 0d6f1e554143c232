"""The built-in training job equals plain PyTorch on the same samples, for any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipe_workers import losses_of, run_recipe, train_by_plain_muon, train_plainly
from windlass.config import load_config
from windlass.config_models import MuonParams
from windlass.conformance.rank_pool import run_ranks
from windlass.models import SHAPES
from windlass.recipe import OPTIMIZERS, TrainOptions, default_config, resolve_config

STEPS, SEED = 4, 7
CONFIG: dict[str, Any] = {
    "train_batch_size": 12,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1}},
}


@pytest.fixture(scope="module")
def plain() -> tuple[list[float], float]:
    return train_plainly(CONFIG, "nano", STEPS, SEED)


@pytest.mark.parametrize(("num_ranks", "stage", "micro_steps"), [(1, 0, 1), (2, 2, 1), (3, 3, 2)])
def test_losses_are_those_of_plain_torch(
    tmp_path: Path, plain: tuple[list[float], float], num_ranks: int, stage: int, micro_steps: int
) -> None:
    zero = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": micro_steps}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | zero))
    options = TrainOptions(
        out=str(tmp_path / "run"), config=str(tmp_path / "config.json"), model="nano", steps=STEPS, seed=SEED
    )
    held_out = run_ranks(run_recipe, num_ranks, options)
    losses, expected = plain
    # fp32: the sums over samples run in another order, and four steps of AdamW spread that a little
    assert losses_of(tmp_path / "run") == pytest.approx(losses, rel=1e-5)
    assert held_out == pytest.approx([expected] * num_ranks, rel=1e-5)


def test_muon_is_plain_muon(tmp_path: Path) -> None:
    """The built-in model's matrices, scales and rates, on two ranks that share them."""
    muon = {"muon": {"ns_dtype": "fp32"}, "zero_optimization": {"stage": 2}}
    params = {"muon_lr": 4e-3, "adam_lr": 2e-3, "weight_decay": 0.1}
    content = CONFIG | muon | {"optimizer": {"type": "Muon", "params": params}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    options = TrainOptions(
        out=str(tmp_path / "run"),
        config=str(tmp_path / "config.json"),
        model="nano",
        steps=STEPS,
        seed=SEED,
        optimizer="Muon",
    )
    run_ranks(run_recipe, 2, options)
    config = resolve_config(options, 2)
    assert losses_of(tmp_path / "run") == pytest.approx(train_by_plain_muon(config, "nano", STEPS, SEED), rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 64])
@pytest.mark.parametrize("steps", [1, 5, 200, 10_000])
def test_default_configuration_is_valid(optimizer: str, model: str, num_ranks: int, steps: int) -> None:
    made = default_config(model, steps, num_ranks, ["float32", "bfloat16"], optimizer=optimizer)
    config = load_config(made, num_ranks)
    assert config.messages == ()
    assert config.bf16.enabled
    assert config.optimizer.type == optimizer
    made = default_config(model, steps, num_ranks, ["float32"], optimizer=optimizer)
    assert not load_config(made, num_ranks).bf16.enabled


def begin(folder: Path, optimizer: str) -> None:
    """What a run by this optimizer leaves behind that another can go on from."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step1")
    (folder / "config.json").write_text(json.dumps({"optimizer": {"type": optimizer}}))


@pytest.mark.parametrize(
    ("content", "asked", "begun", "expected"),
    [
        (None, None, None, "adamw"),
        (None, "MUON", None, "muon"),
        (None, None, "muon", "muon"),
        (None, "Muon", "muon", "muon"),
        ({}, "muon", None, "muon"),
        ({}, None, "muon", "muon"),
        ({"optimizer": {"type": "Muon"}}, None, None, "muon"),
        ({"optimizer": {"type": "Muon"}}, "muon", "muon", "muon"),
        ({"optimizer": {"type": "Adam"}}, None, "adam", "adam"),
    ],
)
def test_optimizer_is_who_says_so_first(
    tmp_path: Path, content: dict[str, Any] | None, asked: str | None, begun: str | None, expected: str
) -> None:
    if begun is not None:
        begin(tmp_path / "run", begun)
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    config = None if content is None else str(tmp_path / "config.json")
    options = TrainOptions(out=str(tmp_path / "run"), config=config, model="nano", resume=True, optimizer=asked)
    chosen = resolve_config(options, 1).optimizer
    assert chosen.type == expected
    if expected == "muon" and not content:  # nobody gave rates: the recipe's own
        given = default_config("nano", 1, 1, optimizer="muon")["optimizer"]["params"]
        rates = {key: given[key] for key in ("lr", "muon_lr", "adam_lr")}
        assert rates["lr"] == rates["muon_lr"]  # what the single rates of a schedule stand for
        assert chosen.params == MuonParams(**rates, betas=(0.9, 0.95), weight_decay=0.1)


@pytest.mark.parametrize(
    ("content", "asked", "begun", "told"),
    [
        ({"optimizer": {"type": "AdamW"}}, "muon", None, "--optimizer muon contradicts .*json, which asks for adamw: "),
        ({"optimizer": {"type": "Muon"}}, "AdamW", None, "--optimizer AdamW contradicts .*, which asks for muon: "),
        ({"optimizer": {"type": "AdamW"}}, None, "muon", "the run in .*, begun with muon, contradicts .* for adamw: "),
        (None, "adamw", "muon", "--optimizer adamw: the run in .* was begun with muon, leave it out"),
        (None, None, "adam", "was begun with adam, which only a configuration can ask for; give the one"),
        (None, "muom", None, r"--optimizer must be adamw or muon, got 'muom'; did you mean muon\?"),
        (None, "sgd", None, "--optimizer must be adamw or muon, got 'sgd', or name another in a configuration"),
    ],
)
def test_optimizers_that_contradict_each_other_are_refused(
    tmp_path: Path, content: dict[str, Any] | None, asked: str | None, begun: str | None, told: str
) -> None:
    if begun is not None:
        begin(tmp_path / "run", begun)
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    config = None if content is None else str(tmp_path / "config.json")
    options = TrainOptions(out=str(tmp_path / "run"), config=config, model="nano", resume=True, optimizer=asked)
    with pytest.raises(ValueError, match=told):
        resolve_config(options, 1)


def test_a_run_whose_configuration_is_spoilt_is_not_resumed(tmp_path: Path) -> None:
    begin(tmp_path / "run", "muon")
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say which optimizer to go on with; put it back or remove it"):
        resolve_config(TrainOptions(out=str(tmp_path / "run"), model="nano", resume=True), 1)


def test_default_batch_is_the_same_on_ranks_that_divide_it() -> None:
    sizes = {n: load_config(default_config("tiny", 200, n), n).train_batch_size for n in (1, 2, 4, 8, 16)}
    assert set(sizes.values()) == {16}
