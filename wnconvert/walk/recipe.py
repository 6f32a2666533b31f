"""How a value is made of weights alone: a small expression, recorded by a trace and evaluated on whatever stands in.

A trace (torch.fx, torch.export, or an eager forward pass) turns every value that no input flows into into a `Leaf` or a
`Call`. Everything else is `OPAQUE`. Evaluating a recipe on indices shows which element goes where; evaluating it on
random numbers shows what it computes.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


class _Opaque(enum.Enum):
    OPAQUE = "depends on the input of the network"


OPAQUE = _Opaque.OPAQUE
"""Stands for a value that is not made of weights alone."""

_DEEPEST = 150
"""Calls inside one another, above which a value counts as opaque: no layer prepares its weight in that many steps."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """A parameter or a buffer."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A function of recipes and plain values.

    Attributes:
        name: of the function, the same for torch functions, tensor methods and ATen operators.
        function: what to call.
        args: recipes and plain values, also inside tuples, lists and slices.
        kwargs: likewise.
        leaves: names of all leaves below, each once.
        depth: calls on the longest way down.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    leaves: tuple[str, ...]
    depth: int


Recipe = Leaf | Call

EVALUATION_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a recorded function may raise when it is called on stand-ins."""


def call(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The recipe of a call, or `OPAQUE` if an argument is."""
    leaves: dict[str, None] = {}
    depth = 0
    for value in parts((args, kwargs)):
        if value is OPAQUE:
            return OPAQUE
        if isinstance(value, Leaf):
            leaves[value.name] = None
        elif isinstance(value, Call):
            leaves |= dict.fromkeys(value.leaves)
            depth = max(depth, value.depth)
    return Call(name, function, args, kwargs, tuple(leaves), depth + 1) if depth < _DEEPEST else OPAQUE


def leaves_of(recipe: Recipe) -> tuple[str, ...]:
    """Names of the weights that a recipe is made of."""
    return (recipe.name,) if isinstance(recipe, Leaf) else recipe.leaves


def parts(value: Any) -> Iterator[Any]:
    """Everything in an argument that is no container."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from parts(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from parts(item)
    elif isinstance(value, slice):
        yield from parts((value.start, value.stop, value.step))
    else:
        yield value


def rebuild(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested argument with everything that is no container changed."""
    if isinstance(value, (tuple, list)):
        return type(value)(rebuild(item, change) for item in value)
    if isinstance(value, Mapping):
        return {key: rebuild(item, change) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(rebuild(item, change) for item in (value.start, value.stop, value.step)))
    return change(value)


def evaluate(recipe: Recipe, leaves: Mapping[str, Tensor]) -> Any:
    """Compute a recipe with these tensors for its leaves.

    Raises:
        EVALUATION_ERRORS: a function does not take them.
    """
    known: dict[int, Any] = {}

    def value_of(part: Any) -> Any:
        if isinstance(part, Leaf):
            return leaves[part.name]
        if not isinstance(part, Call):
            return part
        if id(part) not in known:
            known[id(part)] = part.function(*rebuild(part.args, value_of), **rebuild(part.kwargs, value_of))
        return known[id(part)]

    return value_of(recipe)


@dataclasses.dataclass(frozen=True, slots=True)
class Method:
    """A tensor method as a function."""

    name: str

    def __call__(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return getattr(tensor, self.name)(*args, **kwargs)
