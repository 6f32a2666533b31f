"""Which arguments of a call may be weights, and which of their axes index output units: the table of kinds, read."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any

from wnconvert.kinds import FUNCTIONS, FunctionKind, Operand
from wnconvert.sites import Axis
from wnconvert.walk.recipe import Call, Leaf, Recipe

_TABLE = {kind.name: kind for kind in FUNCTIONS}


@dataclasses.dataclass(frozen=True, slots=True)
class Weighted:
    """An argument made of weights.

    Attributes:
        value: how it is made.
        axes: kept as torch.nn.utils would; may count from the end.
        out_axes: of its output units; may count from the end.
        batched: all axes but the last two index units too.
        groups: of a transposed convolution.
        fixed: it is the weight of the call, whatever the other arguments are.
        listed: it is one of several weights and biases.
    """

    value: Recipe
    axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batched: bool = False
    groups: int = 1
    fixed: bool = True
    listed: bool = False

    def units(self, axes: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """`axes` and those of the batch, as ascending indices into a value of this rank."""
        batch = range(rank - 2) if self.batched else ()
        return tuple(sorted({*batch, *(axis % rank for axis in axes)}))


def weighted(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, list[Weighted]] | None:
    """The arguments of a call that are made of weights, where they should be.

    Returns:
        The kind of layer that the function is, and the arguments. None for a function that is no layer.
    """
    if name == "einsum":
        return name, _einsum(args)
    kind = _TABLE.get(name)
    if kind is None:
        return None
    found = []
    for operand in kind.operands:
        argument = _argument(operand, args, kwargs)
        several = argument if isinstance(argument, (list, tuple)) else ()
        values = several if operand.listed else (argument,)
        made = [value for value in values if isinstance(value, (Leaf, Call))]
        found += [_of_row(kind, operand, value, args, kwargs=kwargs) for value in made]
    return kind.kind or name, found


def _of_row(
    kind: FunctionKind, operand: Operand, value: Recipe, args: tuple[Any, ...], *, kwargs: Mapping[str, Any]
) -> Weighted:
    out_axis, groups = operand.out_axis, 1
    if kind.groups is not None and (kind.transposed is None or _at(kind.transposed, "transposed", args, kwargs)):
        out_axis = 1
        number = _at(kind.groups, "groups", args, kwargs)
        groups = number if isinstance(number, int) else 1
    return Weighted(value, (operand.axis,), (out_axis,), kind.batched, groups, operand.fixed, operand.listed)


def _argument(operand: Operand, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return _at(operand.position, operand.keyword, args, kwargs)


def _at(position: int, keyword: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if keyword in kwargs:
        return kwargs[keyword]
    return args[position] if position < len(args) else None


def _einsum(args: tuple[Any, ...]) -> list[Weighted]:
    """The operands of an einsum. A unit is one index into the labels that a weight shares with the result."""
    if not args or not isinstance(args[0], str):
        return []  # the form with lists of axes instead of an equation
    operands = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else args[1:]
    inputs, arrow, output = args[0].replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(operands):
        return []
    if not arrow:
        letters = inputs.replace(",", "").replace(".", "")
        output = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    found = []
    for term, value in zip(terms, operands, strict=True):
        if isinstance(value, (Leaf, Call)) and "." not in term and set(term) <= set(string.ascii_letters):
            kept = tuple(i for i, label in enumerate(term) if label in output)
            found.append(Weighted(value, kept, kept, fixed=False))
    return found


def output_axis(axis: int, out_axis: int, groups: int) -> tuple[Axis, int]:
    """Where the output units of a layer are, and in how many groups its weight must be seen for that.

    A transposed convolution of several groups has shape `[in, out / groups, ...]`: an output unit is a pair of group
    and index, and its vector runs over the inputs of that group.
    """
    if groups > 1 and axis != out_axis:
        return (0, out_axis + 1), groups
    return out_axis, 1
