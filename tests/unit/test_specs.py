"""Roles, units and ties are read from modules, not from names."""

from __future__ import annotations

import torch
from torch import nn

from windlass.core.materialize import materialize_modules
from windlass.core.specs import Role, describe_model
from windlass.core.trees import iterate_tensors, map_tensors


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Embedding(11, 4)
        self.b = nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.c = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), nn.RMSNorm(4)]), nn.GRU(4, 4)])
        self.d = nn.MultiheadAttention(4, 2)
        self.e = nn.Linear(4, 11)
        self.f = nn.ParameterList([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, 2))])
        self.g = nn.Parameter(torch.zeros(()))


def test_roles_come_from_the_owning_module() -> None:
    specs, _ = describe_model(Zoo())
    roles = {spec.name: spec.role for spec in specs}
    assert roles["a.weight"] is Role.EMBEDDING
    assert roles["b.0.weight"] is Role.CONV
    assert roles["b.0.bias"] is Role.BIAS
    assert roles["b.1.weight"] is roles["b.1.bias"] is roles["c.0.1.weight"] is Role.NORM
    assert roles["b.2.weight"] is roles["c.0.0.weight"] is roles["d.in_proj_weight"] is Role.MATRIX
    assert roles["e.weight"] is Role.HEAD  # as many outputs as there are tokens
    assert roles["g"] is roles["f.1"] is roles["c.1.weight_ih_l0"] is Role.OTHER


def test_units_cover_every_parameter_once() -> None:
    specs, units = describe_model(Zoo())
    assert {spec.name for spec in specs} == {name for name, _ in Zoo().named_parameters()}
    names = [unit.name for unit in units]
    assert len(set(names)) == len(names)
    assert {spec.unit for spec in specs} == set(names)
    own = {unit.name: unit for unit in units}
    assert own[""].spans  # parameters of the root are in use while the others are
    assert {spec.unit for spec in specs if spec.name.startswith("f.")} == {""}  # a list of parameters is never called
    assert {spec.unit for spec in specs if spec.name.startswith("d.")} == {"d"}  # attention reads its child's weight
    assert not own["c.1"].spans


def test_a_stack_of_blocks_is_one_unit_each() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    _, units = describe_model(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False))
    assert [unit.name for unit in units] == ["layers.0", "layers.1", "layers.2"]


def test_tied_names_point_at_the_one_that_owns_the_bytes() -> None:
    module = nn.ModuleDict({"first": nn.Embedding(5, 3), "second": nn.Linear(3, 5, bias=False)})
    module["second"].weight = module["first"].weight
    specs, units = describe_model(module)
    tied = {spec.name: spec.tied_to for spec in specs}
    assert tied == {"first.weight": None, "second.weight": "first.weight"}
    assert [(unit.name, unit.users, unit.spans) for unit in units] == [("first", ("first", "second"), True)]


def test_groups_decide_what_is_trained() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    specs, _ = describe_model(module, {id(module[0].weight): 3})
    assert {spec.name: (spec.trainable, spec.group) for spec in specs}["0.weight"] == (True, 3)
    assert not any(spec.trainable for spec in specs if spec.name != "0.weight")


def test_meta_modules_are_materialised_by_their_own_initialisation() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    materialize_modules(module, ["0", "1"], torch.device("cpu"))
    assert not any(parameter.is_meta for parameter in module.parameters())
    assert torch.equal(module.get_parameter("1.weight"), torch.ones(4))
    assert module.get_parameter("0.weight").abs().max() <= 3**-0.5


def test_tensors_are_found_and_replaced_in_nested_values() -> None:
    one, two, three = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    nested = {"a": [one, (two, "text")], "b": None, "c": three}
    assert [float(tensor) for tensor in iterate_tensors(nested)] == [0.0, 1.0, 2.0]
    doubled = map_tensors(lambda tensor: tensor * 2, nested)
    assert [float(tensor) for tensor in iterate_tensors(doubled)] == [0.0, 2.0, 4.0]
    assert doubled["a"][1][1] == "text"
