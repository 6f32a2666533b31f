"""Looking at a weight of any shape and memory layout as rows, one per magnitude, without copying it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from wnconvert.sites import Axis, kept_axes

_Number = TypeVar("_Number", int, Tensor)

SEGMENT = 1 << 16
"""Elements of a row taken at a time. Fixed, because it decides the order in which squares are added."""


def by_rows(w: Tensor, axis: Axis, groups: int = 1) -> tuple[Tensor, int, tuple[int, ...]]:
    """View `w` with its kept axes first: `(view, number of kept axes, shape of g)`."""
    if groups > 1:
        w = w.view(groups, w.shape[0] // groups, *w.shape[1:])
    kept = kept_axes(axis, w.dim())
    reduced = [i for i in range(w.dim()) if i not in kept]
    g_shape = () if axis is None else tuple(n if i in kept else 1 for i, n in enumerate(w.shape))
    return w.permute((*kept, *reduced)), len(kept), g_shape


def parts(view: Tensor, kept: int, block: int) -> Iterator[Tensor]:
    """Cut `view` into single long rows or runs of whole short rows, in order, of at most `block` elements."""
    rows = math.prod(view.shape[:kept])
    if rows <= 1 or kept == 0:
        if rows:
            yield view
        return
    columns = view.numel() // rows
    inner = view[0].numel()
    if kept > 1 and (inner > block or columns > SEGMENT):
        for i in range(view.shape[0]):
            for part in parts(view[i], kept - 1, block):
                yield part.unsqueeze(0)
        return
    step = max(1, block // max(inner, 1)) if columns <= SEGMENT else 1
    for i in range(0, view.shape[0], step):
        yield view[i : i + step]


def workspace(scratch: Tensor, part: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Two views of one piece of `scratch`: in the shape of `part`, and as `[rows, columns]`.

    They are laid out as `part` is, so that copying between them runs along memory on both sides.
    """
    flat, rows = scratch[: part.numel()], math.prod(part.shape[:kept])
    if 0 < kept < part.dim() and part.stride(kept - 1) < part.stride(-1):
        last = flat.view(*part.shape[kept:], *part.shape[:kept])
        order = (*range(part.dim() - kept, part.dim()), *range(part.dim() - kept))
        return last.permute(order), flat.view(-1, rows).t()
    return flat.view(part.shape), flat.view(rows, -1)


def pieces(view: Tensor, start: int, stop: int) -> Iterator[Tensor]:
    """Yield views that cover the elements `start..stop` of `view` in row-major order, without copying it."""
    if stop - start == view.numel():
        yield view
        return
    inner = view[0].numel()
    first, last = start // inner, (stop - 1) // inner
    if first == last:
        yield from pieces(view[first], start - first * inner, stop - first * inner)
        return
    if start % inner:
        yield from pieces(view[first], start % inner, inner)
        first += 1
    if stop // inner > first:
        yield view[first : stop // inner]
    if stop % inner:
        yield from pieces(view[stop // inner], 0, stop % inner)


def copy_range(part: Tensor, start: int, stop: int, target: Tensor) -> None:
    """Copy the elements `start..stop` of `part`, in row-major order, into a flat target."""
    first = 0
    for piece in pieces(part, start, stop):
        target[first : first + piece.numel()].view(piece.shape).copy_(piece)
        first += piece.numel()


def index_of(number: _Number, shape: Sequence[int]) -> tuple[_Number, ...]:
    """The index along each axis of what has this number, or these numbers, in row-major order."""
    index = []
    for n in reversed(shape):
        index.append(number % n)
        number = number // n
    return tuple(reversed(index))
