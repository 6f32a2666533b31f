"""A copy of a network to trace. Tracing runs the forward pass, and what that changes must not stay."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def twin(root: nn.Module, *, data: bool, hooks: bool = False) -> Iterator[nn.Module]:
    """Lend a copy of a network.

    Afterwards the copy is emptied: tracers leave it in reference cycles, and the parameters of a large network should
    not wait for the garbage collector.

    Args:
        root: the network.
        data: parameters share the memory of the originals, so that whoever runs the copy must not let it write to them.
            Otherwise they have none.
        hooks: keep the hooks that look at outputs. They are the owner's, and remember what they please; what runs
            before the forward pass may make the weight, and is always kept.
    """
    memo: dict[int, Any] = {id(parameter): _stand_in(parameter, data) for parameter in root.parameters()}
    for module in root.modules():
        # Buffers are small. torch's legacy weight norm keeps a computed weight, which deepcopy refuses.
        held = (*module._buffers.values(), *vars(module).values())
        memo |= {
            id(value): value.detach().clone() for value in held if isinstance(value, Tensor) and id(value) not in memo
        }
    made = _copy(root, memo)
    originals = {id(vars(module)) for module in root.modules()}
    ours = [vars(module) for module in made.modules() if id(vars(module)) not in originals]
    for attributes in ours if not hooks else ():
        attributes["_forward_hooks"] = type(attributes["_forward_hooks"])()
    try:
        yield made
    finally:
        for attributes in ours:
            attributes.clear()


def _stand_in(parameter: nn.Parameter, data: bool) -> nn.Parameter:
    """Another parameter, so that assigning to its `.data` changes nothing of ours."""
    if type(parameter) is not nn.Parameter:
        return parameter
    value = parameter.detach() if data else torch.empty_like(parameter, device="meta")
    made = nn.Parameter(value, parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


def _copy(root: nn.Module, memo: dict[int, Any]) -> nn.Module:
    known = dict(memo)
    try:
        made: nn.Module = copy.deepcopy(root, memo)
    except Exception:  # noqa: BLE001 whatever an attribute holds may refuse to be copied in any way it likes
        return _copy_modules(root, known)
    return made


def _copy_modules(root: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy the tree of modules, and share what cannot be copied: locks, generators, open files."""
    modules = list(root.modules())
    for module in modules:
        memo[id(module)] = module.__class__.__new__(module.__class__)
    for module in modules:
        vars(memo[id(module)]).update({name: _copied(value, memo) for name, value in vars(module).items()})
    made: nn.Module = memo[id(root)]
    return made


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # noqa: BLE001 see above
        made = _copied_parts(value, memo)
    memo[id(value)] = made
    return made


def _copied_parts(value: Any, memo: dict[int, Any]) -> Any:
    """Copy what forward passes fill and empty: a single result with a gradient is enough to refuse a deep copy."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) is dict:
        return {key: _copied(item, memo) for key, item in value.items()}
    if type(value) is list:
        return [_copied(item, memo) for item in value]
    return value
