"""Where the elements of a weight end up, when a network moves them about before it uses them.

No movement of data needs a rule of its own: the recipe is replayed on a tensor of indices or, where it only makes
views, on a tensor without data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wnconvert.walk.recipe import EVALUATION_ERRORS, Call, Leaf, Recipe, leaves_of, parts, rebuild


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVEMENTS = _words(
    """
    T H mT mH numpy_T matrix_H adjoint as_strided atleast_1d atleast_2d atleast_3d broadcast_to cat chunk
    column_stack concat concatenate contiguous data diagonal dstack dsplit expand expand_as flatten flip fliplr
    flipud getitem hsplit hstack index_select index masked_select moveaxis movedim narrow narrow_copy permute ravel
    repeat repeat_interleave reshape reshape_as roll rot90 select slice split split_with_sizes squeeze stack
    swapaxes swapdims t take tensor_split tile transpose unbind unflatten unfold unsqueeze view view_as vsplit
    vstack unsafe_chunk unsafe_split pad constant_pad_nd channel_shuffle pixel_shuffle pixel_unshuffle _unsafe_view
    _reshape_alias
    """
)
"""Functions that only move elements."""

COPIES = _words(
    """
    to type type_as float half double bfloat16 cpu cuda clone detach alias _to_copy lift_fresh lift_fresh_copy
    requires_grad_ identity Identity _assert_tensor_metadata positive
    """
)
"""Functions that give the same values, perhaps in another dtype."""

_FACTS = _words("shape size dim ndim numel len stride")
"""Functions that ask for no values at all."""

_SCALINGS = _words("mul multiply div divide true_divide truediv neg negative")
"""Functions that leave directions alone, where the other operand is not made of the same weight."""

_UNUSED = -1


def moved(recipe: Recipe, shapes: Mapping[str, Sequence[int]]) -> Tensor | None:
    """Where every element of a value comes from.

    Args:
        recipe: of the value.
        shapes: of all its leaves.

    Returns:
        Indices of the value's shape: an element of a leaf is the index into that leaf plus the sizes of the leaves
        before it in `leaves_of(recipe)`; -1 is none. None if the recipe does more than move and scale.
    """
    made: dict[str, Tensor] = {}
    first = 0
    for name in leaves_of(recipe):
        size = math.prod(shapes[name])
        made[name] = torch.arange(first, first + size).reshape(tuple(shapes[name]))
        first += size
    try:
        ids = _Replay(made.__getitem__, copying=True).of(recipe)
    except EVALUATION_ERRORS:
        return None
    return ids if isinstance(ids, Tensor) and ids.dtype == torch.int64 else None


def first_index(recipe: Recipe, name: str, shapes: Mapping[str, Sequence[int]]) -> int:
    """Index of the first element of a leaf in what `moved` returns."""
    names = leaves_of(recipe)
    return sum(math.prod(shapes[other]) for other in names[: names.index(name)])


class View(NamedTuple):
    """A strided view of a contiguous tensor, as torch describes it: element `i` is at `offset + sum(i * strides)`."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def view(recipe: Recipe, shapes: Mapping[str, Sequence[int]]) -> View | None:
    """What a recipe makes of its one leaf, if it only makes views, copies and scales; else None. Takes no memory."""
    if len(leaves_of(recipe)) != 1:
        return None
    root = torch.empty(tuple(shapes[leaves_of(recipe)[0]]), dtype=torch.int64, device="meta")
    try:
        made = _Replay(lambda _: root, copying=False).of(recipe)
    except EVALUATION_ERRORS:
        return None
    if not isinstance(made, Tensor) or (made is not root and made._base is not root):
        return None
    return View(int(made.storage_offset()), tuple(made.shape), tuple(made.stride()))


class _Replay:
    """Evaluates a recipe on stand-ins for its leaves, as far as it only moves elements."""

    def __init__(self, leaf: Callable[[str], Tensor], *, copying: bool) -> None:
        self._leaf = leaf
        self._copying = copying
        self._known: dict[int, Any] = {}

    def of(self, part: Any) -> Any:
        if isinstance(part, Leaf):
            return self._leaf(part.name)
        if not isinstance(part, Call):
            return part
        if id(part) not in self._known:
            self._known[id(part)] = self._call(part)
        return self._known[id(part)]

    def _call(self, call: Call) -> Any:
        name = call.name.rstrip("_")
        args, kwargs = rebuild(call.args, self.of), rebuild(call.kwargs, self.of)
        if not call.leaves or not any(isinstance(part, Tensor) for part in parts((args, kwargs))):
            value = call.function(*args, **kwargs)
            # Numbers that are no weight. Whole ones may be the indices of a selection.
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return torch.full(value.shape, _UNUSED) if floating else value
        if name in ("contiguous", "clone") and self._copying:
            return call.function(*args, **kwargs)  # a view of the copy may need its layout
        if call.name in COPIES or name in (*COPIES, "contiguous"):
            return args[0]
        if name in _SCALINGS:
            return _scaled(call, args)
        if name in ("pad", "constant_pad_nd") and "constant" in (kwargs.get("mode", "constant"), *args[2:3]):
            return call.function(*args[:2], value=_UNUSED)
        if name not in MOVEMENTS and name not in _FACTS:
            raise TypeError(f"{call.name} does more than move elements")
        return call.function(*args, **kwargs)


def _scaled(call: Call, args: tuple[Any, ...]) -> Tensor:
    """The side of a product that is the weight: the larger one. The other is a number, or a factor per unit."""
    sides = [
        (set(leaves_of(part)) if isinstance(part, (Leaf, Call)) else set(), ids)
        for part, ids in zip(call.args[:2], args[:2], strict=True)
        if isinstance(ids, Tensor)
    ]
    if len(sides) == 1:
        return sides[0][1]
    (small_leaves, small), (large_leaves, large) = sorted(sides, key=lambda side: (side[1].numel(), bool(side[0])))
    if small_leaves & large_leaves or small.numel() == large.numel() or (small + large).shape != large.shape:
        raise TypeError("a product of two weights, or of a weight with itself")
    return large


def names_of(recipe: Recipe) -> list[str]:
    """Names of the functions of a recipe that do more than move elements, in the order of their calls."""
    if isinstance(recipe, Leaf):
        return []
    found = [name for part in parts((recipe.args, recipe.kwargs)) if isinstance(part, Call) for name in names_of(part)]
    plain = recipe.name.rstrip("_")
    return found if plain in MOVEMENTS | _FACTS or recipe.name in COPIES else [*found, recipe.name]
