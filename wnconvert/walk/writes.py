"""Which weights a call changes in place, itself or through a view."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from wnconvert.walk.moves import COPIES, MOVEMENTS
from wnconvert.walk.recipe import Call, Leaf

_ASSIGNMENTS = frozenset(
    ["setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "imatmul", "iand", "ior", "ixor"]
)
_HARMLESS = frozenset(["requires_grad_", "detach_", "share_memory_", "retain_grad"])
_COPYING = frozenset(["index", "index_select", "masked_select", "repeat", "tile", "take", "cat", "stack"])


def written(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[str]:
    """Names of the weights whose memory a call writes to.

    Args:
        name: of the function, without underscores before it.
        function: what is called.
        args: recipes and plain values.
        kwargs: likewise.
    """
    for value in _targets(name, function, args, kwargs):
        yield from _roots(value)


def _targets(
    name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[Any]:
    schema = getattr(function, "_schema", None)
    if schema is not None:
        for position, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield args[position] if position < len(args) else kwargs.get(argument.name)
        return
    if "out" in kwargs:
        yield kwargs["out"]
    in_place = (name.endswith("_") and name not in _HARMLESS) or name in _ASSIGNMENTS or kwargs.get("inplace") is True
    if in_place and args:
        yield args[0]


def _roots(value: Any) -> Iterator[str]:
    """The weights that a value may share memory with."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _roots(item)
    elif isinstance(value, Leaf):
        yield value.name
    elif isinstance(value, Call):
        name = value.name.rstrip("_")
        # A cast to the dtype that it has already is no copy either.
        if value.args and (name in (MOVEMENTS - _COPYING) | (COPIES - {"clone", "_to_copy"}) or value.name != name):
            yield from _roots(value.args[0])
