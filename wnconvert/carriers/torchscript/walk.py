"""Finds the weights of a TorchScript archive and what they are to the network."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from wnconvert.carriers.torchscript.archive import StoredTensor
from wnconvert.carriers.torchscript.code import Code, class_name
from wnconvert.carriers.torchscript.frames import Modules, Place, join
from wnconvert.carriers.torchscript.interpreter import Interpreter
from wnconvert.carriers.torchscript.pickled import Instance
from wnconvert.kinds import MODULES, ModuleKind
from wnconvert.sites import Use
from wnconvert.walk.operands import output_axis
from wnconvert.walk.reader import Computed


class Holding(Protocol):
    """What is needed of an archive, so that one that is not written yet can be walked too."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def root(self) -> Any:
        """The value of its pickle."""

    @property
    def constants(self) -> tuple[Any, ...]:
        """Of its code."""

    @property
    def code(self) -> Mapping[str, bytes]:
        """Its files, by record."""


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the archive under one of its names.

    Attributes:
        stored: how the archive holds it.
        role: `parameter`, `buffer`, `attribute` or `constant`.
        module: whose attribute it is; None for a constant of the code.
        leaf: name of the attribute.
    """

    stored: StoredTensor
    role: str
    module: Instance | None
    leaf: str


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What the code of an archive says of its weights.

    Attributes:
        modules: of the archive.
        weights: every tensor by each of its names.
        names: all names of a tensor, by its identity.
        uses: by the first name.
        norms: weight norms that the code computes, by the name of the weight.
        places: see `Interpreter.places`.
        interpreter: which knows what expressions are.
    """

    modules: Modules
    weights: Mapping[str, Weight]
    names: Mapping[tuple[Any, ...], list[str]]
    uses: Mapping[str, list[Use]]
    norms: Mapping[str, Computed]
    places: list[tuple[str, list[Place]]]
    interpreter: Interpreter

    def aliases(self, name: str) -> list[str]:
        """All names of a tensor, the first one first."""
        return self.names[_identity(self.weights[name])]


def walk(archive: Holding, numbers: Mapping[str, Tensor]) -> Found:
    """Follow all code of an archive.

    Args:
        archive: what it holds.
        numbers: the constants of the code that are single numbers, by name.

    Raises:
        InputError: its code cannot be parsed.
    """
    modules = Modules.of(archive.root, Code(archive.code, archive.name))
    weights = dict(_weights(archive, modules))
    named: dict[tuple[Any, ...], list[str]] = {}
    for name, weight in weights.items():
        named.setdefault(_identity(weight), []).append(name)
    stand_ins = {
        name: torch.empty_strided(w.stored.shape, w.stored.stride, dtype=w.stored.dtype, device="meta")
        for name, w in weights.items()
        if not _is_stale(name, weights)
    }
    leaves = {key[1:]: names[0] for key, names in named.items() if not key[0] and names[0] in stand_ins}
    interpreter = Interpreter(modules, leaves, stand_ins, numbers)
    interpreter.run()
    uses: dict[str, list[Use]] = {}
    for use in (*interpreter.reader.uses, *_by_class(modules, leaves)):
        uses.setdefault(use.root, []).append(use)
    merged = {name: _merged(found) for name, found in uses.items()}
    return Found(modules, weights, named, merged, interpreter.norms, interpreter.places, interpreter)


def _weights(archive: Holding, modules: Modules) -> Iterator[tuple[str, Weight]]:
    for module, path in _every_path(modules):
        for leaf, stored, role in modules.tensors(module):
            yield join(path, leaf), Weight(stored, role, module, leaf)
    for i, value in enumerate(archive.constants):
        constant = StoredTensor.of(value)
        if constant is not None:
            yield f"CONSTANTS.c{i}", Weight(constant, "constant", None, f"c{i}")


def _every_path(modules: Modules) -> Iterator[tuple[Instance, str]]:
    """Every module under every path, as torch lists them."""
    stack = [(module, "") for module in list(modules.paths)[:1]]
    while stack:
        module, path = stack.pop()
        yield module, path
        below = [(child, join(path, name)) for name, child in modules.children(module)]
        stack += reversed(below)


def _identity(weight: Weight) -> tuple[Any, ...]:
    return weight.role == "constant", *weight.stored.identity


def _is_stale(name: str, weights: Mapping[str, Weight]) -> bool:
    """Whether a tensor is what an old torch left beside a pair: the weight at the time of the trace."""
    return weights[name].role == "attribute" and {f"{name}_g", f"{name}_v"} <= weights.keys()


def _by_class(modules: Modules, leaves: Mapping[tuple[Any, ...], str]) -> Iterator[Use]:
    """Uses that the classes of modules show: recurrent layers, and layers that no code calls."""
    for module, path in modules.paths.items():
        kind = kind_of(module.cls.qualified)
        if kind is None:
            continue
        fields = modules.fields_of(module)
        groups = fields.constants.get("groups", 1) if fields else 1
        out_axis, count = output_axis(kind.axis, kind.out_axis, groups if isinstance(groups, int) else 1)
        for leaf, stored, role in modules.tensors(module):
            its_own = role == "parameter" and kind.rank in (None, len(stored.shape)) and not leaf.endswith(("_g", "_v"))
            if its_own and any(fnmatch.fnmatchcase(leaf, pattern) for pattern in kind.weights):
                name = leaves.get(stored.identity, join(path, leaf))
                yield Use(name, kind.name, path or module.cls.name, kind.axis, out_axis, count)


def kind_of(qualified: str) -> ModuleKind | None:
    """The row of the table for a class of an archive: a class of torch.nn, also one that torch has parametrized."""
    name = class_name(qualified).removeprefix("__torch__.")
    leaf = name.rpartition(".")[2]
    if name.startswith("torch.nn.utils.parametrize."):
        leaf = leaf.removeprefix("Parametrized")
    elif not name.startswith("torch.nn."):
        return None
    cls = getattr(torch.nn, leaf, None)
    if leaf == "NonDynamicallyQuantizableLinear":
        cls = torch.nn.Linear
    for kind in MODULES:
        base = getattr(torch.nn, kind.path.rpartition(".")[2], None)
        if isinstance(cls, type) and isinstance(base, type) and issubclass(cls, base):
            return kind
    return None


def _merged(uses: list[Use]) -> list[Use]:
    """One use per place; where code and class tell of one place, the axes of the code and the kind of the class.

    A change in place says nothing of either, and counts by itself.
    """
    found: dict[tuple[str, bool], Use] = {}
    for use in uses:
        key = use.where, use.written
        known = found.get(key)
        if known is None:
            found[key] = use
        elif known.kind[:1].islower() and use.kind[:1].isupper():
            found[key] = dataclasses.replace(known, kind=use.kind)
    return list(found.values())
