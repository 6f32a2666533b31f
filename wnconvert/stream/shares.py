"""What a part of a tensor has of a stretch of the whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from wnconvert.files.box import Box

_FEW = 64
"""Runs that are copied one by one. More are copied by an index of each element, as they are short."""


class Share(NamedTuple):
    """Elements that follow one another in a part.

    Attributes:
        first: number of the first one in the part.
        length: how many.
        places: where they are in the stretch: some slices, or the number of each.
    """

    first: int
    length: int
    places: list[slice] | NDArray[np.intp]


def share(box: Box, start: int, stop: int) -> Share | None:
    """What a part has of the elements `start..stop` of a tensor, or None if that is nothing."""
    runs, length = box.runs(start, stop), box.run
    if not runs:
        return None
    if len(runs) > _FEW:
        numbers = box.place(np.arange(runs.start, runs.stop))[:, None] + np.arange(length)
        flat = numbers.reshape(-1)
        low, high = (int(i) for i in np.searchsorted(flat, [start, stop]))
        return Share(runs.start * length + low, high - low, flat[low:high] - start)
    places = [(max(place, start), min(place + length, stop)) for place in map(box.place, runs)]
    first = runs.start * length + places[0][0] - box.place(runs.start)
    return Share(first, sum(b - a for a, b in places), [slice(a - start, b - start) for a, b in places])


def scatter(values: memoryview, target: memoryview, places: list[slice] | NDArray[np.intp], size: int) -> None:
    """Copy elements of `size` bytes to places of `target`."""
    source, goal = _elements(values, size), _elements(target, size)
    if not isinstance(places, list):
        goal[places] = source
        return
    at = 0
    for place in places:
        count = place.stop - place.start
        goal[place] = source[at : at + count]
        at += count


def gather(values: memoryview, places: list[slice] | NDArray[np.intp], size: int) -> memoryview:
    """The elements of `size` bytes at some places, one after the other."""
    source = _elements(values, size)
    if not isinstance(places, list):
        return _bytes(source[places])
    return _bytes(source[places[0]] if len(places) == 1 else np.concatenate([source[place] for place in places]))


def _elements(values: memoryview, size: int) -> NDArray[Any]:
    return np.frombuffer(values, dtype=np.dtype((np.void, size)))


def _bytes(values: NDArray[Any]) -> memoryview:
    return values.view(np.uint8).data
