"""What a configuration may say about Muon, and what becomes of it."""

from __future__ import annotations

from typing import Any

import pytest

from windlass.config import Config, ConfigError, load_config
from windlass.config_models import MuonParams
from windlass.muon_rules import muon_rules

SCALE = (
    'info: muon.scale is not given and is "rms", for which learning rates and decay are those of AdamW '
    '(DeepSpeed\'s Muon scales as "original" does)'
)
DECAY = (
    "info: optimizer.params.weight_decay is not given and is 0.01, the default of torch.optim.AdamW "
    "(DeepSpeed's own Muon takes 0)"
)


def load(params: Any = None, scheduler: Any = None, *, type: str = "Muon", **muon: Any) -> Config:
    optimizer = {"type": type, "params": params or {}}
    return load_config({"optimizer": optimizer, "scheduler": scheduler, **({"muon": muon} if muon else {})}, 1)


def error_of(*arguments: Any, **named: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*arguments, **named)
    return str(caught.value)


@pytest.mark.parametrize(
    ("params", "rates"),
    [
        ({}, (0.001, 0.001, 0.001)),
        ({"lr": 0.02}, (0.02, 0.02, 0.02)),
        ({"lr": 0.02, "adam_lr": 0.001}, (0.02, 0.02, 0.001)),
        ({"muon_lr": 0.02, "adam_lr": None}, (0.001, 0.02, 0.001)),
        ({"lr": "auto", "muon_lr": "auto", "adam_lr": 0.5}, (0.001, 0.001, 0.5)),
    ],
)
def test_both_rates_are_lr_unless_given(params: dict[str, Any], rates: tuple[float, ...]) -> None:
    found = load(params).optimizer.params
    assert isinstance(found, MuonParams)
    assert (found.lr, found.muon_lr, found.adam_lr) == rates


@pytest.mark.parametrize("type", ["Muon", "muon", "MUON"])
def test_deepspeeds_section_is_understood(type: str) -> None:
    params = {"lr": 0.02, "momentum": 0.9, "betas": [0.9, 0.95], "eps": 1e-10, "weight_decay": 0, "ns_method": "gram"}
    config = load(params, type=type, scale="original")
    assert config.messages == ()
    assert config.optimizer.type == "muon"
    assert config.optimizer.params == MuonParams(
        lr=0.02, muon_lr=0.02, adam_lr=0.02, momentum=0.9, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0
    )
    assert config.muon.ns_method == "gram"
    buffered = {"optimizer": {"type": type, "params": params}, "muon": {"scale": "rms"}}
    buffered["zero_optimization"] = {"stage": 2, "save_muon_momentum_buffer_in_memory": True}
    (line,) = load_config(buffered, 1).messages
    assert line.endswith("results are the same: zero_optimization.save_muon_momentum_buffer_in_memory")


def test_defaults_that_differ_are_told() -> None:
    assert load({}).messages == (DECAY, SCALE)
    assert load({"weight_decay": 0.1}).messages == (SCALE,)
    assert load({"weight_decay": 0.1}, scale="rms").messages == ()


@pytest.mark.parametrize("type", ["Adam", "AdamW"])
@pytest.mark.parametrize(
    ("name", "value"), [("momentum", 0.9), ("muon_lr", 1), ("adam_lr", "auto"), ("ns_method", "auto")]
)
def test_muons_parameters_are_no_adams(type: str, name: str, value: Any) -> None:
    expected = f'optimizer.params.{name} belongs to Muon, and optimizer.type is "{type}": remove it, or use "Muon"'
    assert error_of({name: value}, type=type) == f"config: {expected}"
    assert load({name: None}, type=type).optimizer.type == type.lower()  # null asks for nothing


@pytest.mark.parametrize("value", [True, False, "auto"])
def test_adams_mode_is_not_muons(value: Any) -> None:
    assert error_of({"adam_w_mode": value}) == (
        "config: optimizer.params.adam_w_mode belongs to Adam: remove it, beside Muon weights are decayed as by AdamW"
    )


@pytest.mark.parametrize(
    ("params", "muon", "sentence"),
    [
        ({"momentum": 1}, {}, "optimizer.params.momentum must be less than 1, got 1"),
        ({"lr": "high"}, {}, 'optimizer.params.lr must be a number, got "high"'),
        ({"betas": [0.9, 2]}, {}, "optimizer.params.betas[1] must be less than 1, got 2"),
        (3, {}, "optimizer.params must be an object, got 3"),
        ({"nesterov": True}, {}, "unknown key 'optimizer.params.nesterov' (did you mean 'muon.nesterov'?)"),
        ({}, {"scale": "big"}, 'muon.scale must be one of "rms", "original" or "spectral", got "big"'),
        ({}, {"rolls": {}}, "unknown key 'muon.rolls' (did you mean 'muon.roles'?)"),
        ({}, {"roles": {"*.a": "adam"}}, 'muon.roles.*.a must be one of "muon" or "adamw", got "adam"'),
        (
            {"ns_method": "gram"},
            {"ns_method": "standard"},
            'optimizer.params.ns_method = "gram" contradicts muon.ns_method = "standard", remove one of them',
        ),
        (
            {"ns_method": "gram"},
            {"ns_dtype": "bf16"},
            'ns_method = "gram" is not safe with muon.ns_dtype = "bf16", whose rounding errors it lifts to singular '
            'values, set muon.ns_dtype to "fp32" or "fp16", or leave it out',
        ),
    ],
)
def test_each_mistake_has_its_sentence(params: Any, muon: dict[str, Any], sentence: str) -> None:
    assert error_of(params, **muon) == f"config: {sentence}"


@pytest.mark.parametrize("splits", [0, [], [2, 0], [2.5], "3", True, None, [True]])
def test_row_splits_are_counts(splits: Any) -> None:
    assert "muon.views.* must be the rows of each part as a list, or a number of equal parts" in error_of(
        views={"*": splits}
    )


def test_row_splits_and_dtypes_in_their_spellings() -> None:
    muon = load(views={"a": 3, "b": [4, 2.0]}, ns_dtype="bfloat16", momentum_dtype="torch.bfloat16").muon
    assert muon.views == {"a": 3, "b": (4, 2)}
    assert (muon.ns_dtype, muon.momentum_dtype) == ("bf16", "bf16")


def test_muons_section_without_muon_is_told() -> None:
    told = 'warning: muon has no effect without "type": "Muon" in optimizer'
    assert told in load({}, type="AdamW", nesterov=False).messages
    assert load_config({"muon": {"nesterov": False}}, 1).messages == (told,)
    assert load_config({"muon": {}}, 1).messages == ()


@pytest.mark.parametrize(
    ("kind", "params", "named"),
    [
        ("WarmupLR", {"warmup_max_lr": 0.1}, "scheduler.params.warmup_max_lr"),
        ("WarmupDecayLR", {"total_num_steps": 2000}, "scheduler.params.warmup_max_lr"),  # its default is a rate
        (
            "OneCycle",
            {"cycle_min_lr": 0.1, "cycle_max_lr": 1},
            "scheduler.params.cycle_min_lr and scheduler.params.cycle_max_lr",
        ),
        ("LRRangeTest", {}, "scheduler.params.lr_range_test_min_lr"),
    ],
)
def test_rates_for_all_groups_stand_for_lr(kind: str, params: dict[str, Any], named: str) -> None:
    section, decay = {"type": kind, "params": params}, {"weight_decay": 0.1}
    assert error_of({"muon_lr": 0.02, "adam_lr": 0.001}, section) == (
        f"config: {named} may stand for muon_lr = 0.02 and adam_lr = 0.001 alike, add the optimizer.params.lr that the "
        "schedule's rates stand for, or give a list [Muon's, AdamW's] instead of each"
    )
    assert "add the optimizer.params.lr" in error_of({"lr": 0, "muon_lr": 0.02}, section)
    (line,) = load({"lr": 0.01, "muon_lr": 0.02, **decay}, section, scale="rms").messages
    assert line == (
        f"info: by {named} optimizer.params.lr = 0.01 is meant, Muon's rates are 2 times and AdamW's 1 times the "
        "schedule's"
    )
    assert load({"lr": 0.01, **decay}, section, scale="rms").messages == ()


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("WarmupLR", {}),
        ("WarmupLR", {"warmup_max_lr": [0.02, 0.001]}),
        ("WarmupCosineLR", {"total_num_steps": 2000}),
        ("OneCycle", {"cycle_min_lr": 0, "cycle_max_lr": [0.02, 0.001]}),
    ],
)
def test_schedules_by_each_groups_own_rate_need_no_lr(kind: str, params: dict[str, Any]) -> None:
    section = {"type": kind, "params": params}
    config = load({"muon_lr": 0.02, "adam_lr": 0.001, "weight_decay": 0}, section, scale="rms")
    assert config.messages == ()


@pytest.mark.parametrize(
    ("asked", "able", "products", "travel"),
    [
        ("auto", ("float32", "bfloat16"), "bfloat16", "bfloat16"),
        ("auto", ("float32",), "float32", "float32"),
        ("fp32", ("bfloat16",), "float32", "float32"),
        ("bf16", (), "bfloat16", "bfloat16"),
        ("fp16", (), "float16", "bfloat16"),
    ],
)
def test_dtypes_follow_from_the_device_unless_given(
    asked: str, able: tuple[str, ...], products: str, travel: str
) -> None:
    rules = muon_rules(load(ns_dtype=asked, coefficients="ten", momentum_dtype="bf16", clip="off"), able)
    assert (rules.product_dtype, rules.direction_dtype, rules.momentum_dtype) == (products, travel, "bfloat16")
    assert (len(rules.coefficients), rules.clip, rules.scale) == (10, "off", "rms")


def test_resolved_settings_are_plain_json() -> None:
    resolved = load({"ns_method": "gram"}, views={"a": [2, 2]}, roles={"b": "adamw"}).resolved()
    assert resolved["muon"]["views"] == {"a": [2, 2]}
    assert resolved["muon"]["roles"] == {"b": "adamw"}
    assert resolved["muon"]["ns_method"] == "gram"
