"""What each parameter of a model is for, read from the modules that hold it, never from patterns in names.

[Note: repeated] Some roles follow from the place of a module. A block that a model has several of holds no head, even
where a matrix in it has as many rows as there are tokens: below an element of a ModuleList, or below one of several
alike modules beside each other, nothing is a head.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from dataclasses import dataclass, field

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList


class Role(enum.StrEnum):
    """What a parameter is for; optimizers choose by role."""

    MATRIX = "matrix"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    BIAS = "bias"
    ROUTER = "router"
    CONV = "conv"
    EXPERTS = "experts"  # a stack of matrices [experts, rows, columns]
    ADAPTER = "adapter"  # low-rank factors beside a frozen matrix
    OTHER = "other"  # vectors, scalars, recurrent weights, and whatever a module unknown here holds


_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# What users put parameters of their own into; any other module of torch.nn gives its parameters a meaning.
_HOLDERS = (nn.ParameterList, nn.ParameterDict, nn.ModuleList, nn.ModuleDict, nn.Sequential)
# The two factors of an adapter, as the method's paper and its libraries call them (Hu et al. 2021).
_FACTORS = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})


@dataclass(eq=False)
class _Place:
    """One module in the tree, and what is known of it and its surroundings."""

    path: str
    module: nn.Module
    held: dict[str, nn.Parameter]  # directly
    parent: _Place | None = None
    children: dict[str, _Place] = field(default_factory=dict)
    signature: tuple[object, ...] = ()  # equal for modules that are alike; empty without parameters
    stacks: frozenset[int] = frozenset()  # sizes of the stacks of experts in it
    factors: frozenset[str] = frozenset()  # names of what in it is an adapter's, beside what that adapts
    adapter: bool = False  # it belongs to an adapter as a whole
    repeated: bool = False  # below an element of a stack; see [Note: repeated]


def find_roles(module: nn.Module) -> dict[str, Role]:
    """The role of each name in `module.named_parameters(remove_duplicate=False)`. Two names of one parameter have the
    role of the module that each goes through, but what is also an embedding is nowhere a plain matrix."""
    vocabularies = frozenset(inner.num_embeddings for inner in module.modules() if isinstance(inner, nn.Embedding))
    roles: dict[str, Role] = {}
    names: dict[int, list[str]] = {}
    for place in _survey(module):
        for leaf, parameter in place.held.items():
            name = f"{place.path}.{leaf}" if place.path else leaf
            adapter = place.adapter or leaf in place.factors
            roles[name] = Role.ADAPTER if adapter else _role_of(place, leaf, tuple(parameter.shape), vocabularies)
            names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        if any(roles[name] is Role.EMBEDDING for name in tied):
            roles.update({name: Role.HEAD for name in tied if roles[name] is Role.MATRIX})
    return roles


def _survey(module: nn.Module) -> list[_Place]:
    """Every module under each of its names, outer ones first."""
    places: dict[str, _Place] = {}
    for path, inner in module.named_modules(remove_duplicate=False):
        above, _, name = path.rpartition(".")
        place = _Place(path, inner, dict(inner.named_parameters(recurse=False, remove_duplicate=False)))
        if path:
            place.parent = places[above]
            place.parent.children[name] = place
        places[path] = place
    for place in reversed(places.values()):
        _look_inside(place)
    for place in places.values():
        alike = Counter(child.signature for child in place.children.values())
        for name, child in place.children.items():
            child.adapter = place.adapter or name in place.factors
            element = isinstance(place.module, nn.ModuleList) or alike[child.signature] > 1
            for grandchild in child.children.values():
                grandchild.repeated = child.repeated or element
    return list(places.values())


def _look_inside(place: _Place) -> None:
    """What is known of a module by what it holds, once that is known of its children."""
    shapes = [(leaf, tuple(parameter.shape)) for leaf, parameter in place.held.items()]
    inner = [(name, child.signature) for name, child in place.children.items() if child.signature]
    if shapes or inner:
        place.signature = (type(place.module), *shapes, *inner)
    place.stacks = _stacks_in(place)
    held = {name for name, _ in (*shapes, *inner)}
    present = {name for factors in _FACTORS if factors <= held for name in factors}
    if held - present:
        place.factors = frozenset(present)


def _stacks_in(place: _Place) -> frozenset[int]:
    sizes = _own_stacks(place).union(*(child.stacks for child in place.children.values()))
    if isinstance(place.module, nn.ModuleList | nn.ModuleDict) and len(place.children) > 1:
        signatures = {child.signature for child in place.children.values()}
        if len(signatures) == 1 and () not in signatures:
            sizes |= {len(place.children)}
    return sizes


def _own_stacks(place: _Place) -> frozenset[int]:
    """Of the parameters that a module holds itself."""
    shapes = (tuple(parameter.shape) for parameter in place.held.values())
    return frozenset(shape[0] for shape in shapes if _is_stack(place.module, shape))


def _is_stack(owner: nn.Module, shape: tuple[int, ...]) -> bool:
    known = type(owner).__module__.startswith("torch.nn.") and not isinstance(owner, _HOLDERS)
    return (
        len(shape) == 3
        and min(shape) > 1
        and not known
        and not isinstance(owner, (*_NORMS, *_CONVOLUTIONS, *_EMBEDDINGS, nn.Bilinear, nn.RNNBase))
        and not isinstance(owner, ParametrizationList)  # parts from which another module's weight is made
    )


def _role_of(place: _Place, leaf: str, shape: tuple[int, ...], vocabularies: frozenset[int]) -> Role:
    owner = place.module
    if isinstance(owner, _NORMS):
        return Role.NORM
    if leaf in ("bias", "in_proj_bias"):
        return Role.BIAS
    if isinstance(owner, _EMBEDDINGS):
        return Role.EMBEDDING
    role = Role.OTHER
    if isinstance(owner, _CONVOLUTIONS) and leaf == "weight":
        # The groups of a convolution are matrices of their own: a depthwise one is made of vectors.
        shape, role = (shape[0] // owner.groups, *shape[1:]), Role.CONV
    elif isinstance(owner, nn.Linear) and leaf == "weight":
        role = Role.MATRIX
        if _is_router(place, owner):
            role = Role.ROUTER
        elif owner.out_features in vocabularies and _may_be_head(place, owner):
            role = Role.HEAD
    elif isinstance(owner, nn.MultiheadAttention) and len(shape) == 2:
        role = Role.MATRIX
    elif _is_stack(owner, shape):
        role = Role.EXPERTS
    if role in (Role.MATRIX, Role.CONV):
        vector = shape[0] == 1 or math.prod(shape[1:]) == 1
        return Role.OTHER if vector else role
    return role


def _may_be_head(place: _Place, linear: nn.Linear) -> bool:
    """Whether a Linear onto as many outputs as there are tokens is the head: it is not part of a block, and nothing
    beside it takes its outputs, as the second matrix of an MLP does."""
    parent = place.parent
    if parent is None:
        return True
    if place.repeated or isinstance(parent.module, nn.MultiheadAttention):
        return False
    later = False
    for other in parent.children.values():
        if other is place:
            later = True
        elif isinstance(other.module, nn.Linear):
            # Of two square ones in a row the second may be the head.
            follows = later or other.module.out_features != linear.out_features
            if follows and other.module.in_features == linear.out_features:
                return False
    return True


def _is_router(place: _Place, linear: nn.Linear) -> bool:
    """Whether a Linear has one output for each expert of a stack beside it. A module that holds nothing else stands
    for it."""
    parent = place.parent
    while parent is not None and parent.parent is not None and _holds_only(parent, place):
        place, parent = parent, parent.parent
    if parent is None:
        return False
    beside = (child.stacks for child in parent.children.values() if child is not place)
    return linear.out_features in _own_stacks(parent).union(*beside)


def _holds_only(place: _Place, child: _Place) -> bool:
    others = any(other.signature for other in place.children.values() if other is not child)
    return not others and not place.held
