"""What the calls of a network say of its weights: which layer-like functions use them, on which axis, and what else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from wnconvert import weightnorm
from wnconvert.errors import PairError
from wnconvert.names import find_pairs
from wnconvert.sites import Axis, Use
from wnconvert.walk import moves, probe, recipe, units, writes
from wnconvert.walk.operands import Weighted, output_axis, weighted
from wnconvert.walk.recipe import OPAQUE, Call, Leaf, Recipe, leaves_of


@dataclasses.dataclass(frozen=True, slots=True)
class Computed:
    """Two weights whose weight norm a network computes with functions of its own.

    Attributes:
        name: of the weight that they stand for.
        g: name of the magnitude.
        v: name of the direction.
    """

    name: str
    g: str
    v: str


class Reader:
    """Takes the calls of a network in their order.

    Attributes:
        uses: of weights, in the order of the calls.
        others: for every weight the names of the other functions that take it.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Take all parameters and buffers by name. Only that of a pair is read, to tell what a formula computes."""
        self.uses: list[Use] = []
        self.others: dict[str, dict[str, None]] = {}
        self._weights = dict(weights)
        self._drawn: tuple[tuple[str, str] | None, list[dict[str, Tensor]]] = (None, [])
        self._shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        self._names = {pair.v: pair for pair in find_pairs(self._shapes) if pair.problem is None}

    def call(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        where: str,
    ) -> tuple[Any, Computed | None]:
        """Take one call.

        Args:
            name: of the function, without the underscores around it.
            function: what was called.
            args: recipes, `OPAQUE`, and plain values, also inside containers.
            kwargs: likewise.
            where: the node or layer, for reports.

        Returns:
            The recipe of its result, `OPAQUE` if an input flows into it; and the pair whose weight norm it finishes.
        """
        changed = [n for n in writes.written(name, function, args, kwargs) if self._weights[n].is_floating_point()]
        for root in changed:
            problem = f"changed in place, by {name}"
            self.uses.append(Use(root, "Unknown", where, None, None, problem=problem, written=True))
        layer = weighted(name, args, kwargs)
        result = OPAQUE if layer else recipe.call(name, function, args, kwargs)
        if result is OPAQUE:
            used = self._consume(*layer, where=where) if layer else set()
            for leaf in _leaves((args, kwargs)) - used:
                self.others.setdefault(leaf, {})[name] = None
            return OPAQUE, None
        pair = self._weight_norm(result)
        if pair is None:
            return result, None
        v = self._weights[pair.v]
        self._weights[pair.name], self._shapes[pair.name] = v, tuple(v.shape)
        return Leaf(pair.name), pair

    def _consume(self, kind: str, arguments: list[Weighted], *, where: str) -> set[str]:
        """Add the uses of one call, and return the names of the weights used."""
        arguments = [argument for argument in arguments if self._floats(argument.value)]
        free = [argument for argument in arguments if not argument.fixed]
        if len(free) > 1:
            # A product of two weights has no input to speak of, unless one of them is computed from weights.
            plain = [argument for argument in free if self._is_moved(argument.value)]
            arguments = [argument for argument in arguments if argument.fixed] + (plain if len(plain) == 1 else [])
        used: set[str] = set()
        for argument in arguments:
            for name in leaves_of(argument.value):
                if self._weights[name].is_floating_point():
                    used.add(name)
                    self.uses += self._use(name, kind, argument, where)
        return used

    def _use(self, name: str, kind: str, argument: Weighted, where: str) -> list[Use]:
        shape, value = self._shapes[name], argument.value
        if len(shape) < 2:
            # A factor of the weight, or a bias among its columns, is nothing to speak of.
            problem = "a vector has no output units to keep"
            alone = isinstance(value, Leaf) and not argument.listed
            return [Use(name, kind, where, None, None, problem=problem)] if alone else []
        if argument.groups > 1:
            if not isinstance(value, Leaf):
                problem = "a grouped transposed convolution reads it through a view"
                return [Use(name, kind, where, None, None, problem=problem)]
            out, groups = output_axis(argument.axes[0], argument.out_axes[0], argument.groups)
            return [Use(name, kind, where, argument.axes[0], out, groups)]
        kept = self._kept(name, argument, argument.axes)
        out_kept = kept if argument.out_axes == argument.axes else self._kept(name, argument, argument.out_axes)
        if kept is None or out_kept is None:
            return [Use(name, kind, where, None, None, problem=self._why_not(value))]
        return [Use(name, kind, where, _single(kept), _single(out_kept))]

    def _kept(self, name: str, argument: Weighted, axes: tuple[int, ...]) -> tuple[int, ...] | None:
        """Which axes of a weight the given axes of an argument are."""
        shape, value = self._shapes[name], argument.value
        if isinstance(value, Leaf):
            return argument.units(axes, len(shape))
        view = moves.view(value, self._shapes)
        kept = (
            units.kept_axes_of_view(view, argument.units(axes, len(view.sizes)), shape)
            if view and len(view.sizes) > 1
            else None
        )
        if kept is not None:
            return kept
        ids = moves.moved(value, self._shapes)
        if ids is None or ids.dim() < 2:
            return None
        first = moves.first_index(value, name, self._shapes)
        return units.kept_axes(ids, argument.units(axes, ids.dim()), first=first, shape=shape)

    def _why_not(self, value: Recipe) -> str:
        if probe.ignores_scale(value, self._weights):
            return "standardised before use, which cancels its scale: a magnitude would mean nothing"
        names = moves.names_of(value)
        if names:
            return f"computed before use, by {', '.join(dict.fromkeys(names))}"
        return "no choice of axes gives each output unit a magnitude of its own"

    def _floats(self, value: Recipe) -> bool:
        return any(self._weights[name].is_floating_point() for name in leaves_of(value))

    def _is_moved(self, value: Recipe) -> bool:
        if isinstance(value, Leaf) or moves.view(value, self._shapes) is not None:
            return True
        return moves.moved(value, self._shapes) is not None

    def _draw(self, g: str, v: str) -> list[dict[str, Tensor]]:
        """Numbers for a pair. A formula has many steps, which ask for the same ones again and again."""
        if self._drawn[0] != (g, v):
            self._drawn = (g, v), probe.draw_pair(self._weights, g, v)
        return self._drawn[1]

    def _weight_norm(self, result: Call) -> Computed | None:
        """The pair whose weight norm this value is."""
        if len(result.leaves) != 2 or result.name.rstrip("_") not in _LAST_STEPS | moves.MOVEMENTS | moves.COPIES:
            return None
        for g, v in (result.leaves, result.leaves[::-1]):
            known = self._names.get(v)
            if known is not None and known.g != g:
                continue
            try:
                weightnorm.pair_axis(self._shapes[g], self._shapes[v])
            except PairError:
                continue
            draws = self._draw(g, v)
            if draws and probe.is_weight_norm(result, draws, self._weights, g=g, v=v):
                return Computed(known.name if known else v, g, v)
        return None


_LAST_STEPS = frozenset(
    ["mul", "multiply", "div", "divide", "true_divide", "truediv", "imul", "itruediv", "_weight_norm"]
)
"""Functions that may be the last of a weight norm. Trying every function would take time."""


def _single(kept: tuple[int, ...]) -> Axis:
    return kept[0] if len(kept) == 1 else kept


def _leaves(values: Any) -> set[str]:
    return {name for part in recipe.parts(values) if isinstance(part, (Leaf, Call)) for name in leaves_of(part)}
