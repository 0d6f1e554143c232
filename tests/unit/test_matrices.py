"""The matrices that a parameter holds are the slices that anyone would cut out of it by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from windlass.core.matrices import find_matrices
from windlass.core.specs import ParamSpec, Role


def spec(shape: tuple[int, ...], role: Role = Role.MATRIX, views: tuple[int, ...] = ()) -> ParamSpec:
    return ParamSpec("layer.weight", shape, "float32", role, "layer", views=views)


def cut(parameter: ParamSpec) -> list[Tensor]:
    """By the runs, out of a parameter whose elements are their own places."""
    flat = torch.arange(parameter.numel)
    found = []
    for run in find_matrices(parameter):
        for number in range(run.count):
            start = run.start + number * run.stride
            found.append(flat[start : start + run.numel].view(run.rows, run.columns))
    return found


def by_hand(parameter: ParamSpec) -> list[Tensor]:
    whole = torch.arange(parameter.numel).view(parameter.shape)
    experts = list(whole) if parameter.role is Role.EXPERTS else [whole]
    splits = parameter.views or (experts[0].shape[0],)
    return [part.flatten(1) for expert in experts for part in expert.split(splits)]


@pytest.mark.parametrize(
    "parameter",
    [
        spec((6, 4)),
        spec((6, 4), views=(2, 2, 2)),
        spec((8, 4), views=(4, 2, 2)),  # grouped queries
        spec((8, 4), views=(2, 2, 4)),
        spec((8, 4), views=(2, 4, 2)),
        spec((5, 3, 2, 2), Role.CONV),
        spec((6, 3, 2), Role.CONV, views=(3, 3)),
        spec((3, 4, 5), Role.EXPERTS),
        spec((3, 4, 5), Role.EXPERTS, views=(2, 2)),
        spec((3, 6, 5), Role.EXPERTS, views=(1, 5)),
        spec((2, 3, 4), Role.OTHER),  # by an override, of a role that has no stacks
    ],
    ids=str,
)
def test_matrices_are_slices(parameter: ParamSpec) -> None:
    found, expected = cut(parameter), by_hand(parameter)
    order = [int(matrix[0, 0]) for matrix in found]
    assert len(set(order)) == len(found) == len(expected)
    for matrix, place in zip(found, order, strict=True):
        (same,) = [one for one in expected if int(one[0, 0]) == place]
        assert torch.equal(matrix, same)


def test_equal_neighbours_are_one_run() -> None:
    assert [(run.count, run.rows) for run in find_matrices(spec((12, 4), views=(4, 4, 2, 2)))] == [(2, 4), (2, 2)]
    assert [run.count for run in find_matrices(spec((64, 4, 4), Role.EXPERTS))] == [64]


def test_nothing_is_no_matrix() -> None:
    assert find_matrices(spec((4, 0), views=(2, 2))) == ()


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (spec((8, 4), views=(4, 2)), r"has 8 rows, which row splits of 4 \+ 2 = 6 do not divide"),
        (spec((8, 4), views=(4, 4, 0)), r"row splits of 4 \+ 4 \+ 0"),
        (spec((2, 8, 4), Role.EXPERTS, views=(8, 8)), "has 8 rows"),
        (spec((8,)), r"of shape \(8,\) is not a matrix"),
        (spec(()), "is not a matrix"),
    ],
)
def test_what_does_not_add_up_is_an_error(parameter: ParamSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_matrices(parameter)
