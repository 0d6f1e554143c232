"""Who updates which parameter, with which settings, as which matrices: roles, overrides, groups, schedules."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import windlass
from windlass.config import Config, load_config
from windlass.core.muon import MuonSettings
from windlass.core.specs import describe_model
from windlass.muon_groups import assign_matrices, declared_views, split_groups
from windlass.optimizer import (
    PlannedOptimizer,
    build_optimizer,
    build_scheduler,
    group_of_parameters,
    load_groups,
    read_settings,
    save_groups,
)


class Block(nn.Module):
    """Grouped queries in one weight, gate and up in another."""

    matrix_views: ClassVar = {"qkv.weight": (8, 4, 4)}

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 16)
        self.gate_up = nn.Linear(8, 12, bias=False)
        self.code = nn.Parameter(torch.zeros(5, 3))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.attention = nn.MultiheadAttention(8, 2)
        self.conv = nn.Conv1d(8, 4, 3, groups=2)
        self.head = nn.Linear(8, 32, bias=False)
        self.head.weight = self.embedding.weight


MATRICES = {
    *(f"blocks.{n}.{name}.weight" for n in range(2) for name in ("qkv", "gate_up")),
    *("attention.in_proj_weight", "attention.out_proj.weight", "conv.weight"),
}


def configure(params: Mapping[str, Any] | None = None, scheduler: Any = None, **muon: Any) -> Config:
    optimizer = {"type": "Muon", "params": {"lr": 0.01, **(params or {})}}
    return load_config({"optimizer": optimizer, "muon": muon, "scheduler": scheduler}, 1)


def halves(module: nn.Module, groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Algorithm -> names."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found: dict[str, set[str]] = {"muon": set(), "adamw": set()}
    for group in groups:
        found[group["algorithm"]] |= {names[id(parameter)] for parameter in group["params"]}
    return found


def test_roles_decide_unless_told_otherwise() -> None:
    model = Model()
    found = halves(model, split_groups(model, model.parameters(), configure()))
    assert found["muon"] == MATRICES
    assert found["adamw"] == {name for name, _ in model.named_parameters()} - MATRICES


def test_overrides_from_the_weakest_to_the_strongest() -> None:
    model = Model()
    one, other = "blocks.0.qkv.weight", "blocks.1.qkv.weight"
    model.blocks[0].qkv.weight.use_muon = False  # type: ignore[union-attr]
    model.blocks[0].code.use_muon = True  # type: ignore[union-attr]
    by_parameter = halves(model, split_groups(model, model.parameters(), configure()))["muon"]
    assert by_parameter == (MATRICES | {"blocks.0.code"}) - {one}
    groups: list[dict[str, Any]] = [
        {"params": [model.get_parameter(one), model.get_parameter("blocks.1.code")], "use_muon": True},
        {"params": [model.get_parameter(other), model.get_parameter("blocks.0.code")], "use_muon": False},
    ]
    assert halves(model, split_groups(model, groups, configure()))["muon"] == {one, "blocks.1.code"}
    roles = {"blocks.0.qkv.*": "adamw", "*.qkv.weight": "muon", "head.weight": "muon"}
    found = halves(model, split_groups(model, [*groups, {"params": [model.embedding.weight]}], configure(roles=roles)))
    # The first pattern that fits counts, and a tied parameter answers to both of its names.
    assert found["muon"] == {other, "blocks.1.code", "embedding.weight"}


@pytest.mark.parametrize(
    ("muon", "message"),
    [
        ({"roles": {"block.*": "adamw"}}, r"muon.roles has the pattern 'block\.\*', which fits no parameter"),
        ({"views": {"*.qvk.weight": 2}}, r"muon.views has the pattern '\*\.qvk\.weight', which fits no parameter"),
        ({"views": {"*.code": [2, 3]}}, "fits only parameters that AdamW updates"),
        ({"roles": {"blocks.*": "muon"}}, r"'blocks.0.norm.weight' of shape \(8,\) is not a matrix"),
        ({"roles": {"*": "adamw"}}, "none of the model's 19 parameters is a matrix"),
        ({"views": {"*.gate_up.weight": 5}}, r"'blocks.0.gate_up.weight' of shape \(12, 8\) into 5 equal parts"),
        ({"views": {"*.gate_up.weight": [8, 8]}}, r"has 12 rows, which row splits of 8 \+ 8 = 16 do not divide"),
    ],
)
def test_what_cannot_be_meant_is_an_error(muon: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assigned(Model(), configure(**muon))


def test_a_model_without_matrices_is_an_error() -> None:
    with pytest.raises(ValueError, match="none of the model's 3 parameters"):
        build_optimizer(nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4)), configure(), None, None)


@pytest.mark.parametrize("said", ["group", "parameter"])
def test_a_vector_is_not_for_muon(said: str) -> None:
    model = Model()
    group: dict[str, Any] = {"params": list(model.parameters())}
    if said == "group":
        group["use_muon"] = True
    else:
        model.conv.bias.use_muon = True  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="is not a matrix, so Muon cannot train it"):
        split_groups(model, [group], configure())


def assigned(model: nn.Module, config: Config) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> algorithm and row splits, as the planner is told."""
    optimizer = build_optimizer(model, config, None, None)
    specs, _ = describe_model(model, group_of_parameters(optimizer))
    return {s.name: (s.algorithm, s.views) for s in assign_matrices(specs, optimizer.param_groups, model, config)}


def test_row_splits_from_modules_and_from_the_configuration() -> None:
    found = assigned(Model(), configure(views={"blocks.1.qkv.weight": [4, 12], "*.gate_up.weight": 2}))
    assert found["blocks.0.qkv.weight"] == ("muon", (8, 4, 4))  # the block declares it
    assert found["blocks.1.qkv.weight"] == ("muon", (4, 12))  # the configuration overrides it
    assert found["blocks.0.gate_up.weight"] == ("muon", (6, 6))
    assert found["attention.in_proj_weight"] == ("muon", (8, 8, 8))  # torch's own
    assert found["attention.out_proj.weight"] == ("muon", ())
    assert found["conv.weight"] == ("muon", (2, 2))  # a kernel for each group of channels
    assert found["blocks.0.qkv.bias"] == found["embedding.weight"] == ("adamw", ())


def test_an_outer_module_overrides_an_inner_one() -> None:
    model = Model()
    model.matrix_views = {"blocks.1.qkv.weight": (4, 12)}  # type: ignore[assignment]
    views = declared_views(model)
    assert (views["blocks.0.qkv.weight"], views["blocks.1.qkv.weight"]) == ((8, 4, 4), (4, 12))
    model.matrix_views = {"blocks.1.qvk.weight": (4, 12)}  # type: ignore[assignment]
    with pytest.raises(
        ValueError, match=r"matrix_views of Model '' names 'blocks.1.qvk.weight', which is no parameter"
    ):
        declared_views(model)


def test_settings_of_both_halves() -> None:
    params = {"adam_lr": 0.002, "momentum": 0.9, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.3}
    model = Model()
    optimizer = build_optimizer(model, configure(params), None, None)
    muon, adamw = read_settings(optimizer)
    assert muon == MuonSettings(lr=0.01, momentum=0.9, weight_decay=0.3)
    assert not isinstance(adamw, MuonSettings)
    assert (adamw.lr, adamw.betas, adamw.eps) == (0.002, (0.8, 0.9), 1e-6)
    assert (adamw.weight_decay, adamw.decoupled) == (0.3, True)


def test_settings_of_a_group_go_where_they_belong() -> None:
    model = Model()
    first, second = list(model.blocks[0].parameters()), list(model.blocks[1].parameters())
    groups: list[dict[str, Any]] = [
        {"params": first, "lr": 0.5, "weight_decay": 0.0, "momentum": 0.7, "betas": (0.5, 0.6), "name": "first"},
        {"params": iter(second), "muon_lr": 0.25, "eps": 1e-3},
        {"params": list(model.attention.named_parameters())},  # as torch takes them too
    ]
    optimizer = build_optimizer(model, configure({"muon_lr": 0.02}), groups, None)
    kinds = [group["algorithm"] for group in optimizer.param_groups]
    assert kinds == ["muon", "adamw"] * 3
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 0.25, 0.01, 0.02, 0.01]
    assert [group["lr_ratio"] for group in optimizer.param_groups] == [1, 1, 25, 1, 2, 1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0, 0.01, 0.01, 0.01, 0.01]
    muon, adamw = optimizer.param_groups[:2]
    assert (muon["momentum"], adamw["betas"], muon["name"], adamw["name"]) == (0.7, (0.5, 0.6), "first", "first")
    assert not {"betas", "eps", "muon_lr", "use_muon"} & set(muon)
    assert not {"momentum", "muon_lr", "adam_lr"} & set(adamw)
    assert optimizer.param_groups[3]["eps"] == 1e-3


def test_a_group_does_not_name_its_algorithm() -> None:
    model = Model()
    with pytest.raises(ValueError, match=r"parameter group 0 has an 'algorithm', .* use_muon"):
        split_groups(model, [{"params": list(model.parameters()), "algorithm": "muon"}], configure())


@pytest.mark.parametrize("make", [torch.optim.Muon, torch.optim.AdamW])
def test_an_optimizer_of_torch_is_not_muon_here(make: Any) -> None:
    model = nn.Linear(4, 4, bias=False)
    message = (
        "torch.optim.Muon keeps whole" if make is torch.optim.Muon else r"says Muon, .* AdamW, does not have groups"
    )
    with pytest.raises(ValueError, match=message):
        build_optimizer(model, configure(), None, make(model.parameters()))


def test_groups_of_muon_need_its_configuration() -> None:
    model = Model()
    made = build_optimizer(model, configure(), None, None)
    assert build_optimizer(model, configure(), None, made) is made
    with pytest.raises(ValueError, match=r"the configuration says adamw, .* has groups for Muon"):
        build_optimizer(model, load_config(None, 1), None, made)


@pytest.mark.parametrize(
    ("schedule", "params"),
    [
        ("WarmupLR", {"warmup_max_lr": 0.1, "warmup_min_lr": 0.01, "warmup_num_steps": 2}),
        ("WarmupLR", {"warmup_num_steps": 2}),  # up to each half's own rate
        ("WarmupDecayLR", {"warmup_num_steps": 2, "total_num_steps": 10, "warmup_max_lr": 0.1}),
        ("OneCycle", {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_first_step_size": 3}),
        ("LRRangeTest", {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 1}),
        ("WarmupCosineLR", {"warmup_num_steps": 2, "total_num_steps": 9}),
    ],
)
def test_rates_keep_their_ratio_under_a_schedule(schedule: str, params: dict[str, Any]) -> None:
    section = {"type": schedule, "params": params}
    config = configure({"lr": 0.004, "muon_lr": 0.02, "adam_lr": 0.001}, section)
    optimizer = build_optimizer(Model(), config, None, None)
    adamw = PlannedOptimizer([{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.004, "betas": (0.9, 0.999)}], {})
    two, one = (build_scheduler(config, made, None) for made in (optimizer, adamw))
    for _ in range(6):
        (lr,) = one.get_last_lr()
        assert two.get_last_lr() == pytest.approx([5 * lr, lr / 4])
        assert [group["lr"] for group in optimizer.param_groups] == two.get_last_lr()
        two.step()
        one.step()


def test_a_list_of_rates_is_taken_as_it_is() -> None:
    section = {"type": "WarmupLR", "params": {"warmup_max_lr": [0.4, 0.3], "warmup_num_steps": 2}}
    config = load_config({"optimizer": {"type": "Muon", "params": {"muon_lr": 0.02}}, "scheduler": section}, 1)
    optimizer = build_optimizer(Model(), config, None, None)
    schedule = build_scheduler(config, optimizer, None)
    for _ in range(3):
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.3]


def test_a_group_without_a_rate_to_stand_for_is_an_error() -> None:
    model = Model()
    config = configure({"lr": 0}, {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}})
    groups = [{"params": list(model.parameters()), "muon_lr": 0.1}]
    with pytest.raises(
        ValueError, match=r"0.1 beside an lr of 0 has no ratio that scheduler.params.warmup_max_lr = 0.1"
    ):
        split_groups(model, groups, config)


def test_momentum_is_cycled_only_where_there_are_betas() -> None:
    scheduler = {"type": "OneCycle", "params": {"cycle_min_lr": 0.1, "cycle_max_lr": 0.2, "cycle_min_mom": 0.5}}
    config = configure(scheduler=scheduler)
    optimizer = build_optimizer(Model(), config, None, None)
    build_scheduler(config, optimizer, None)
    muon, adamw = optimizer.param_groups
    assert "betas" not in muon
    assert (muon["momentum"], adamw["betas"]) == (0.95, (0.5, 0.99))


def test_groups_survive_saving() -> None:
    saved = build_optimizer(Model(), configure({"muon_lr": 0.02}), None, None)
    saved.param_groups[0].update(lr=torch.tensor(0.125), momentum=0.8)
    saved.param_groups[1].update(lr=0.25, betas=(0.1, 0.2))
    text = json.dumps(save_groups(saved))
    for fresh in (build_optimizer(Model(), configure(), None, None) for _ in range(2)):
        load_groups(fresh, json.loads(text))
        assert read_settings(fresh) == read_settings(saved)
        assert [group["lr_ratio"] for group in fresh.param_groups] == [2, 1]
    fresh = build_optimizer(Model(), configure(), None, None)
    assert isinstance(fresh, PlannedOptimizer)
    fresh.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert read_settings(fresh) == read_settings(saved)


@pytest.mark.parametrize("first", [nn.Linear(8, 8), nn.LayerNorm(8)], ids=["beside others", "as the only one"])
def test_a_matrix_that_is_unfrozen_later_is_muons(first: nn.Module) -> None:
    last = nn.Linear(8, 4).requires_grad_(False)
    model = nn.Sequential(copy.deepcopy(first), nn.Tanh(), last)
    with windlass.initialize(model, {"accelerator": "cpu", "optimizer": {"type": "Muon"}}) as engine:
        for frozen in (True, False):
            last.requires_grad_(not frozen)
            before = last.weight.detach().clone()
            engine.backward(engine(torch.arange(16.0).view(2, 8)).square().sum())
            assert engine.step()
            assert torch.equal(before, last.weight) is frozen
        assert set(engine.full_optimizer_state("2.weight")) == {"momentum", "step"}
        assert engine.full_optimizer_state("2.weight")["step"] == 1
        assert engine.full_optimizer_state("0.weight")["step"] == 2
