"""The weights of a program: which names stand for one tensor, and which two tensors make a weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from wnconvert.carriers.overlap import overlaps
from wnconvert.carriers.program.draft import Draft
from wnconvert.names import Pair, find_pairs
from wnconvert.sites import Use
from wnconvert.walk import program as walk
from wnconvert.walk.graph_uses import between
from wnconvert.walk.program import ProgramUses


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """A weight that a program holds as a pair.

    Attributes:
        pairs: the names of the weight, each with the names of its magnitude and direction. All hold the same tensors.
        nodes: where the graph has computed the weight.
        uses: of the weight.
        problem: why it cannot be multiplied, or None.
    """

    pairs: tuple[Pair, ...]
    nodes: tuple[fx.Node, ...]
    uses: tuple[Use, ...]
    problem: str | None = None

    @property
    def keys(self) -> list[str]:
        """Names of all halves."""
        return [key for pair in self.pairs for key in (pair.g, pair.v)]


@dataclasses.dataclass(frozen=True, slots=True)
class Plain:
    """A parameter or buffer that is no half of a pair.

    Attributes:
        names: all names of the tensor.
        uses: by layers.
        others: names of other functions that take it.
        overlaps: another tensor that shares memory with it in another form, or None.
        written: the program changes it in place.
    """

    names: tuple[str, ...]
    uses: tuple[Use, ...]
    others: tuple[str, ...]
    overlaps: str | None
    written: bool


def find(draft: Draft) -> tuple[list[Split], list[Plain]]:
    """List the weights of a program, in the order of its inputs."""
    held = draft.tensors()
    weights = {name: held[name] for name in draft.leaves().values() if isinstance(held.get(name), Tensor)}
    found = walk.read(draft.module, {n: name for n, name in draft.leaves().items() if name in weights}, weights)
    groups: dict[object, list[str]] = {}
    for name, tensor in weights.items():
        groups.setdefault(identity(tensor), []).append(name)
    split = _split(draft, found, weights)
    halves = {key for weight in split for key in weight.keys}
    shared = overlaps(weights, [name for name in weights if not draft.is_parameter(name)])
    plain = []
    for names in groups.values():
        if not halves.intersection(names):
            # A change in place is told by `written`.
            uses = tuple(use for use in found.uses if use.root in names and not use.written)
            others = dict.fromkeys(other for name in names for other in found.others.get(name, ()))
            written = not found.written.isdisjoint(names)
            plain.append(Plain(tuple(names), uses, tuple(others), shared.get(names[0]), written))
    return split, plain


def _split(draft: Draft, found: ProgramUses, weights: Mapping[str, Tensor]) -> list[Split]:
    named = [pair for pair in find_pairs({n: tuple(t.shape) for n, t in weights.items()}) if pair.problem is None]
    formulas = [*found.formulas, *found.inner]
    spelled = {(pair.g, pair.v) for pair in named}
    computed = dict.fromkeys(Pair(f.name, f.g, f.v, "legacy") for f in formulas if (f.g, f.v) not in spelled)
    groups: dict[object, list[Pair]] = {}
    for pair in (*named, *computed):
        groups.setdefault((identity(weights[pair.g]), identity(weights[pair.v])), []).append(pair)
    made = []
    for pairs in groups.values():
        keys = {key for pair in pairs for key in (pair.g, pair.v)}
        nodes = [after_cast(f.node, weights[f.v].dtype) for f in found.formulas if f.v in keys]
        inputs = [draft.node(key) for key in keys]
        if not nodes and any(node.users for node in inputs):
            if not any(f.v in keys for f in found.inner):
                continue  # only called like a pair
            problem: str | None = "a graph inside a higher-order operator computes it"
        else:
            problem = _problem(inputs, nodes, not found.written.isdisjoint(keys))
        names = {pair.name for pair in pairs} | {f.name for f in formulas if f.v in keys}
        uses = tuple(use for use in found.uses if use.root in names)
        problem = problem or _change(found, uses, names, nodes)
        made.append(Split(tuple(pairs), tuple(dict.fromkeys(nodes)), uses, problem))
    return made


def _problem(inputs: Iterable[fx.Node], nodes: list[fx.Node], written: bool) -> str | None:
    if written:
        return "the program writes to its magnitude or direction"
    other = next((node for node in between(inputs, nodes) if node.op == "output" or _acts(node)), None)
    return None if other is None else "the program uses its magnitude or direction by itself"


def _change(found: ProgramUses, uses: Iterable[Use], names: set[str], nodes: list[fx.Node]) -> str | None:
    """How a program changes a weight that it has computed, which would change the parameter in its place."""
    told = next((use.problem for use in uses if use.written), None)
    changed = not found.written.isdisjoint(names) or any(map(walk.is_written, nodes))
    return told or ("changed in place" if changed else None)


def _acts(node: fx.Node) -> bool:
    """Whether a node does something even where nobody uses its value. An assertion of a dtype is no such thing."""
    return node.is_impure() and node.target is not torch.ops.aten._assert_tensor_metadata.default


def after_cast(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The cast to the dtype of the direction, where that is all that becomes of a computed weight."""
    users = [user for user in node.users if user.users or _acts(user)]
    if node.meta["val"].dtype != dtype and len(users) == 1 and users[0].target in _CASTS:
        return users[0] if users[0].meta["val"].dtype == dtype else node
    return node


_CASTS = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)


def identity(tensor: Tensor) -> object:
    """The same for every name of one tensor, also where two parameters share one piece of memory."""
    if not has_data(tensor) or tensor.numel() == 0:
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def has_data(tensor: Any) -> bool:
    """Whether a tensor holds numbers of its own, in the ordinary way."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and not isinstance(tensor, FakeTensor)
    return plain and not tensor.is_meta and tensor.layout == torch.strided
