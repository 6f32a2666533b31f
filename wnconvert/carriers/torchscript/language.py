"""Functions of the TorchScript language itself, as the interpreter calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from wnconvert.carriers.torchscript.frames import UNSET
from wnconvert.carriers.torchscript.pickled import Instance
from wnconvert.walk import recipe
from wnconvert.walk.recipe import OPAQUE

ERRORS = (*recipe.EVALUATION_ERRORS, RecursionError)
"""What computing with plain values of damaged or unusual code may raise."""


class Attributes(Protocol):
    """What is needed of the interpreter."""

    def attribute(self, module: Instance, name: str) -> Any:
        """The value of an attribute."""


_Builtin = Callable[[Attributes, tuple[Any, ...]], Any]


def _number(kind: Callable[[Any], Any]) -> _Builtin:
    def convert(_: Attributes, args: tuple[Any, ...]) -> Any:
        if len(args) != 1 or not isinstance(args[0], (bool, int, float, str)):
            return OPAQUE
        try:
            return kind(args[0])
        except ERRORS:
            return OPAQUE

    return convert


def _range(_: Attributes, args: tuple[Any, ...]) -> Any:
    return range(*args) if all(isinstance(argument, int) for argument in args) and 0 not in args[2:] else OPAQUE


def _getattr(interpreter: Attributes, args: tuple[Any, ...]) -> Any:
    owner, name = args[:2] if len(args) > 1 else (None, None)
    found = isinstance(owner, Instance) and isinstance(name, str)
    return interpreter.attribute(owner, name) if found else OPAQUE


BUILTINS: Mapping[str, _Builtin] = {
    "annotate": lambda _, args: args[-1] if args else OPAQUE,
    "unchecked_cast": lambda _, args: args[-1] if args else OPAQUE,
    "uninitialized": lambda *_: UNSET,
    "getattr": _getattr,
    "range": _range,
    "int": _number(int),
    "float": _number(float),
    "bool": _number(bool),
    "isinstance": lambda *_: OPAQUE,
    "print": lambda *_: None,
}
"""Each by its name."""
