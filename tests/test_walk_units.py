"""Two ways to see which axes of a weight are a layer's units, by strides and by indices, must agree."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wnconvert.walk import moves, recipe, units
from wnconvert.walk.recipe import Call, Leaf, Method, evaluate


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], Leaf | Call, tuple[int, ...]]:
    """A shape, a chain of views of a tensor of that shape, and axes of the result."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    value: Leaf | Call = Leaf("w")
    tensor = torch.zeros(shape)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["transpose", "select", "slice", "flatten", "unflatten", "unsqueeze", "mul", "to"]))
        i = draw(st.integers(0, tensor.dim() - 1))
        n = tensor.shape[i]
        steps: dict[str, tuple[str, tuple[Any, ...]]] = {
            "transpose": ("transpose", (i, draw(st.integers(0, tensor.dim() - 1)))),
            "select": ("select", (i, draw(st.integers(0, n - 1)))),
            "slice": ("narrow", (i, (first := draw(st.integers(0, n - 1))), draw(st.integers(1, n - first)))),
            "flatten": ("flatten", (max(i - 1, 0), i)),
            "unflatten": ("unflatten", (i, (-1, 2 if n % 2 == 0 else 1))),
            "unsqueeze": ("unsqueeze", (i,)),
            "mul": ("mul", (2.0,)),
            "to": ("to", (torch.float16,)),
        }
        name, args = steps[kind]
        if kind == "select" and tensor.dim() == 1:
            continue
        tensor = Method(name)(tensor, *args)
        value = recipe.call(name, Method(name), (value, *args), {})
    axes = tuple(draw(st.sets(st.integers(0, max(tensor.dim() - 1, 0)), min_size=1, max_size=2)))
    return shape, value, axes


@settings(max_examples=150, deadline=None)
@given(chains())
def test_strides_and_indices_agree(case: tuple[tuple[int, ...], Leaf | Call, tuple[int, ...]]) -> None:
    shape, value, axes = case
    shapes = {"w": shape}
    ids = moves.moved(value, shapes)
    assert ids is not None
    # The indices are those of the elements: an independent evaluation on numbers shows the same.
    numbers = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    seen = evaluate(value, {"w": numbers}).double()
    factor = seen.sum() / ids.sum() if ids.sum() else 1.0
    assert torch.equal(seen, ids * factor)
    view = moves.view(value, shapes)
    quick = None if view is None else units.kept_axes_of_view(view, axes, shape)
    exact = units.kept_axes(ids, axes, first=0, shape=shape)
    for kept in (quick, exact):
        assert kept is None or all(len(seen) == 1 for seen in _units_by_group(ids, axes, kept, shape).values())
    if quick is None or exact is None:
        return
    if ids.numel() == math.prod(shape):
        # Nothing is left out, so both must find the fewest magnitudes.
        assert math.prod(shape[i] for i in exact) == math.prod(shape[i] for i in quick)
    for i in quick:
        # No axis is kept in vain: without it units would be mixed, or read and unread elements.
        rest = tuple(j for j in quick if j != i)
        groups = _units_by_group(ids, axes, rest, shape)
        partly = ids.numel() < math.prod(shape)
        assert partly or any(len(seen) > 1 for seen in groups.values())


def _units_by_group(
    ids: torch.Tensor, axes: tuple[int, ...], kept: tuple[int, ...], shape: tuple[int, ...]
) -> dict[tuple[int, ...], set[tuple[int, ...]]]:
    """Which units read the elements that share an index along the kept axes, element by element."""
    found: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for place in torch.cartesian_prod(*(torch.arange(n) for n in ids.shape)).reshape(-1, ids.dim()).tolist():
        element = torch.unravel_index(ids[tuple(place)], shape)
        group = tuple(int(element[i]) for i in kept)
        found.setdefault(group, set()).add(tuple(place[i] for i in axes))
    return found


def test_a_view_needs_no_memory() -> None:
    value = recipe.call("select", Method("select"), (Leaf("w"), 0, 3), {})
    view = moves.view(value, {"w": (1 << 12, 1 << 20, 1 << 12)})
    assert view is not None
    assert units.kept_axes_of_view(view, (0,), (1 << 12, 1 << 20, 1 << 12)) == (0, 1)
