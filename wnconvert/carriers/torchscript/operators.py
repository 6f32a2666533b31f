"""Operators that TorchScript code calls: what their results are while nothing but weights and plain values go in."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from wnconvert.walk.recipe import EVALUATION_ERRORS, OPAQUE, Call, Leaf, Recipe, evaluate

PLAIN: Mapping[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "floordiv": operator.floordiv,
    "remainder": operator.mod,
    "neg": operator.neg,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "len": len,
    "sqrt": math.sqrt,
    "__not__": operator.not_,
    "__is__": operator.is_,
    "__isnot__": operator.is_not,
    "__contains__": operator.contains,
    "__and__": operator.and_,
    "__or__": operator.or_,
    "append": list.append,
    "list": list,
    "slice": lambda items, start=None, stop=None, step=1: items[start:stop:step],
}
"""Operators on numbers and lists, by their name after `aten::`."""

_FORBIDDEN = frozenset({"save", "load", "from_file", "set_data", "backward", "manual_seed", "set_grad_enabled", "warn"})
"""Operators that do something besides computing a value."""

CHANGING_LISTS = frozenset({"_set_item", "insert", "extend", "pop", "clear", "Delete", "remove", "reverse", "sort"})
"""Operators on lists that change which item is where."""

METADATA = frozenset({"dim", "size", "numel", "len", "is_floating_point", "stride", "dtype", "layout", "device"})
"""Operators whose result depends on the shape and type of a tensor alone."""


def may_run(name: str) -> bool:
    """Whether an operator only computes a value. In-place ones do not: they end in an underscore."""
    return not in_place(name) and name not in _FORBIDDEN


def in_place(name: str) -> bool:
    """Whether an operator changes its first argument."""
    return name.endswith("_") and not name.endswith("__")


def aten(name: str) -> Callable[..., Any] | None:
    """The operator of this name that computes with tensors, or None."""
    found = getattr(torch.ops.aten, name, None) if may_run(name) else None
    return found if callable(found) else None


class Shapes:
    """Shapes and types of values made of weights, from tensors without data."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Take a tensor without data for every weight, by name."""
        self._meta = dict(weights)
        self._known: dict[int, tuple[Recipe, Any]] = {}

    def alias(self, name: str, of: str) -> None:
        """Let a computed weight have the shape of a stored one."""
        self._meta[name] = self._meta[of]

    def of(self, value: Recipe) -> Tensor | None:
        """A tensor of the shape and type of a value, or None if that cannot be told."""
        if id(value) not in self._known:
            try:
                made = evaluate(value, self._meta)
            except EVALUATION_ERRORS:
                made = None
            self._known[id(value)] = value, made
        made = self._known[id(value)][1]
        return made if isinstance(made, Tensor) else None

    def metadata(self, name: str, args: tuple[Any, ...]) -> Any:
        """What an operator of `METADATA` says of a value, or `OPAQUE`."""
        tensor = self.of(args[0]) if args and isinstance(args[0], (Leaf, Call)) else None
        if tensor is None:
            return OPAQUE
        answers: Mapping[str, Callable[..., Any]] = {
            "dim": Tensor.dim,
            "size": lambda t, *axis: t.size(*axis) if axis else list(t.shape),
            "stride": lambda t, *axis: t.stride(*axis) if axis else list(t.stride()),
            "numel": Tensor.numel,
            "len": len,
            "is_floating_point": Tensor.is_floating_point,
            # Numbers that stand for types in TorchScript: strided is 0.
            "layout": lambda t: 0 if t.layout == torch.strided else OPAQUE,
            "dtype": lambda t: t.dtype,
            "device": lambda _: torch.device("cpu"),
        }
        try:
            return answers[name](tensor, *args[1:])
        except EVALUATION_ERRORS:
            return OPAQUE
