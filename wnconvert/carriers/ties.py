"""Which names of a live network are names of one weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wnconvert import weightnorm
from wnconvert.carriers.module_forms import SplitWeight
from wnconvert.errors import PairError


def groups(tensors: Mapping[str, Tensor], split: Mapping[str, SplitWeight]) -> dict[str, list[str]]:
    """For every name all names of the same weight, itself included.

    Args:
        tensors: plain weights, and the directions of split ones, by the name of the weight.
        split: the split ones. torch's weight norm gives each owner of a tied weight a magnitude of its own: as long as
            these give the same weight it is one, and once they have trained apart it is not.
    """
    by_memory: dict[object, list[list[str]]] = {}
    group_of: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        here = by_memory.setdefault(_memory(tensor), [])
        group = next((group for group in here if _same_weight(split.get(group[0]), split.get(name))), None)
        if group is None:
            group = []
            here.append(group)
        group.append(name)
        group_of[name] = group
    return group_of


def _memory(tensor: Tensor) -> object:
    """The same for every name of one tensor, also where two parameters share one piece of memory."""
    if tensor.is_meta or tensor.numel() == 0 or type(tensor) is not nn.Parameter:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _same_weight(a: SplitWeight | None, b: SplitWeight | None) -> bool:
    """Whether two owners of one tensor, as a weight or as a direction, have the same weight."""
    if a is None or b is None:
        pair = a or b
        return pair is None or _gives_its_direction(pair)
    if a.g is b.g:
        return True
    return type(a.g) is type(b.g) is nn.Parameter and not a.g.is_meta and torch.equal(a.g, b.g)


def _gives_its_direction(pair: SplitWeight) -> bool:
    if pair.problem:
        return False
    try:
        return torch.equal(weightnorm.fold(pair.g, pair.v), pair.v)
    except PairError:
        return False
