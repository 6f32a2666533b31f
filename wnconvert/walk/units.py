"""Which axes of a weight keep a magnitude, when a layer reads it through views, slices or concatenation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from wnconvert.walk.moves import View

_UNUSED = -1


def kept_axes(ids: Tensor, axes: Sequence[int], *, first: int, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The axes of a weight that keep a magnitude, so that each belongs to one unit of the layer that reads it.

    Args:
        ids: see `moves.moved`.
        axes: the axes of `ids` that index units.
        first: index of the weight's first element in `ids`.
        shape: of the weight.

    Returns:
        The axes with the fewest magnitudes such that all that shares one is read by one unit; None if an element is
        read by several units.
    """
    size = math.prod(shape)
    # A weight that is repeated for every sample of a batch has no units along that axis.
    axes = [axis for axis in axes if ids.shape[axis] == 1 or not _is_repeated(ids, axis)]
    unit = _units(ids.shape, axes).expand(ids.shape).reshape(-1)
    flat = ids.reshape(-1) - first
    mine = (flat >= 0) & (flat < size)
    flat, unit = flat[mine], unit[mine]
    of = torch.full((size,), _UNUSED, dtype=torch.int64)
    of[flat] = unit
    if not flat.numel() or not torch.equal(of[flat], unit):
        return None
    of = of.reshape(tuple(shape))
    several, single = _candidates(shape)
    # Elements that this layer does not read should not share a magnitude with ones that it does (one expert of many),
    # but may if nothing else is left (the halves of a weight on two inputs).
    for choices, ignore in ((several, False), (several, True), (single, False)):
        for kept in choices:
            if _is_kept(of, kept, ignore):
                return kept
    return None


def _is_repeated(ids: Tensor, axis: int) -> bool:
    return torch.equal(ids, ids.narrow(axis, 0, 1).expand_as(ids))


def _is_kept(of: Tensor, kept: tuple[int, ...], ignore: bool) -> bool:
    """Whether all elements that share an index along `kept` are read by one unit, or none of them is."""
    reduced = [i for i in range(of.dim()) if i not in kept]
    low, high = of, of.amax(reduced)
    if ignore:
        low = torch.where(of == _UNUSED, torch.iinfo(torch.int64).max, of)
    return bool(((low.amin(reduced) == high) | (high == _UNUSED)).all())


def _units(shape: Sequence[int], axes: Sequence[int]) -> Tensor:
    """Number every unit, in a tensor that broadcasts against `shape`."""
    sizes = [n if i in axes else 1 for i, n in enumerate(shape)]
    return torch.arange(math.prod(sizes)).reshape(sizes)


def _candidates(shape: Sequence[int]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Choices of kept axes that leave several elements together, and ones that do not; the fewest magnitudes first."""
    choices = [kept for n in range(1, len(shape)) for kept in itertools.combinations(range(len(shape)), n)]
    counts = {kept: math.prod(shape[i] for i in kept) for kept in choices}
    choices.sort(key=lambda kept: (counts[kept], len(kept), kept))
    size = math.prod(shape)
    return [kept for kept in choices if counts[kept] < size], [kept for kept in choices if counts[kept] == size]


def kept_axes_of_view(view: View, axes: Sequence[int], shape: Sequence[int]) -> tuple[int, ...] | None:
    """What `kept_axes` gives for a strided view whose axes are axes of the weight, parts of one, or some merged.

    Returns:
        None for any other view, which says nothing about the weight.
    """
    steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    start = [view.offset // step % size for step, size in zip(steps, shape, strict=True)]
    covered: dict[int, bool] = {}  # axes of the weight, and whether an axis of units runs along them
    for axis, (size, stride) in enumerate(zip(view.sizes, view.strides, strict=True)):
        if size == 1 or stride == 0:  # repeated for every sample of a batch
            continue
        for i in _covered(size, stride, start, steps, shape=shape):
            if i is None or i in covered:
                return None
            covered[i] = axis in axes
    kept = tuple(i for i, size in enumerate(shape) if size > 1 and covered.get(i, True))
    return kept if kept and any(size > 1 and i not in kept for i, size in enumerate(shape)) else None


def _covered(
    size: int, stride: int, start: Sequence[int], steps: Sequence[int], *, shape: Sequence[int]
) -> Iterator[int | None]:
    """The axes of the weight along which one axis of a view runs; None if it is none."""
    for i in reversed(range(len(shape))):
        if shape[i] == 1 or not steps[i] <= stride < steps[i] * shape[i]:
            continue
        step, rest = divmod(stride, steps[i])
        if rest:
            break
        if start[i] + (size - 1) * step < shape[i]:
            yield i
            return
        # It runs over the whole of this axis and on along the one before it.
        if step != 1 or start[i] or size % shape[i]:
            break
        yield i
        size, stride = size // shape[i], steps[i] * shape[i]
    yield None
