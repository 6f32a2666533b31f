"""Uses that the tree of modules shows: every layer whose class has a row in the table of kinds."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Iterable, Iterator

from torch import nn

from wnconvert.kinds import MODULES, ModuleKind
from wnconvert.sites import Axis, Use


def find_uses(root: nn.Module, split: Iterable[str] = ()) -> Iterator[Use]:
    """Yield one use per weight of every known layer, in the order of the modules.

    Args:
        root: the whole network.
        split: full names of weights that are no parameters at present, because they are split.
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
                out_axis, groups = output_axis(kind.axis, kind.out_axis, getattr(module, "groups", 1))
                yield Use(
                    f"{path}.{leaf}".lstrip("."), kind.name, path or type(module).__name__, kind.axis, out_axis, groups
                )


def kind_of(module: nn.Module) -> ModuleKind | None:
    """The row of the table that a module belongs to."""
    for kind in MODULES:
        package, _, name = kind.path.rpartition(".")
        # A class of a package that nobody imported has no instances.
        cls = getattr(sys.modules.get(package), name, None)
        if cls is not None and isinstance(module, cls):
            return kind
    return None


def output_axis(axis: int, out_axis: int, groups: int) -> tuple[Axis, int]:
    """Where the output units of a layer are, and in how many groups its weight must be seen for that.

    A transposed convolution of several groups has shape `[in, out / groups, ...]`: an output unit is a pair of group
    and index, and its vector runs over the inputs of that group.
    """
    if groups > 1 and axis != out_axis:
        return (0, out_axis + 1), groups
    return out_axis, 1
