"""Uses that the tree of modules shows: every layer whose class has a row in the table of kinds."""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
from collections.abc import Iterable, Iterator

from torch import nn

from wnconvert.kinds import MODULES, ModuleKind
from wnconvert.sites import Use
from wnconvert.walk import custom
from wnconvert.walk.operands import output_axis


def find_uses(root: nn.Module, split: Iterable[str] = (), *, try_layers: bool = True) -> Iterator[Use]:
    """Yield one use per weight of every known layer, in the order of the modules.

    Args:
        root: the whole network.
        split: full names of weights that are no parameters at present, because they are split.
        try_layers: run layers with a forward pass of their own, to see what they do with their weight.
    """
    hidden: dict[str, list[str]] = {}
    for name in split:
        prefix, _, leaf = name.rpartition(".")
        hidden.setdefault(prefix, []).append(leaf)
    for path, module in root.named_modules(remove_duplicate=False):
        kind = kind_of(module)
        if kind is None:
            continue
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        for leaf in (*own, *hidden.get(path, ())):
            if any(fnmatch.fnmatchcase(leaf, pattern) for pattern in kind.weights) and not leaf.endswith(("_g", "_v")):
                yield from _uses(path, module, kind, leaf, try_layers=try_layers)


def _uses(path: str, module: nn.Module, kind: ModuleKind, leaf: str, *, try_layers: bool) -> Iterator[Use]:
    root, where = f"{path}.{leaf}".lstrip("."), path or type(module).__name__
    base = class_of(kind) if try_layers and leaf in module._parameters else None
    seen = None if base is None else custom.uses_of(module, base, leaf)
    if seen is not None:
        yield from (dataclasses.replace(use, root=root, kind=kind.name, where=where) for use in seen)
        return
    out_axis, groups = output_axis(kind.axis, kind.out_axis, getattr(module, "groups", 1))
    yield Use(root, kind.name, where, kind.axis, out_axis, groups)


def kind_of(module: nn.Module) -> ModuleKind | None:
    """The row of the table that a module belongs to."""
    for kind in MODULES:
        cls = class_of(kind)
        if cls is not None and isinstance(module, cls):
            return kind
    return None


def is_plain_layer(module: nn.Module) -> bool:
    """Whether a module is of a class of the table, and computes what that class does."""
    kind = kind_of(module)
    base = None if kind is None else class_of(kind)
    return base is not None and not custom.is_custom(module, base)


def class_of(kind: ModuleKind) -> type[nn.Module] | None:
    """The class of a row; None if nobody imported its package, so that it has no instances."""
    package, _, name = kind.path.rpartition(".")
    return getattr(sys.modules.get(package), name, None)
