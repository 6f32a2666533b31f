"""A part of a tensor: a range along each of its axes. Nothing here imports torch."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeVar

_Numbers = TypeVar("_Numbers", bound=Any)
"""An integer, or an array of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor. All counts of its elements are in row-major order.

    What is side by side in the tensor from the last axis that is cut is a run: the part is one run after the other.

    Attributes:
        shape: of the tensor.
        offsets: where in the tensor the part begins.
        sizes: its shape.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def run(self) -> int:
        """Elements of a run."""
        return math.prod(self.sizes[self._cut :])

    def runs(self, start: int, stop: int) -> range:
        """The numbers of the runs that reach into the elements `start..stop` of the tensor."""
        length = self.run
        every = range(math.prod(self.sizes[: self._cut]) if length and start < stop else 0)
        first = bisect.bisect_right(every, start - length, key=self.place)
        return every[first : bisect.bisect_left(every, stop, key=self.place)]

    def place(self, run: _Numbers) -> _Numbers:
        """Number in the tensor of the first element of a run."""
        cut = self._cut
        number: Any = run
        pitch = math.prod(self.shape[cut:])
        place = number * 0 + (self.offsets[cut] * math.prod(self.shape[cut + 1 :]) if self.shape else 0)
        for axis in reversed(range(cut)):
            index = number % self.sizes[axis]
            number = number // self.sizes[axis]
            place = place + (index + self.offsets[axis]) * pitch
            pitch *= self.shape[axis]
        numbers: _Numbers = place
        return numbers

    @property
    def _cut(self) -> int:
        """The last axis that is cut."""
        return max((i for i, whole in enumerate(self.shape) if self.sizes[i] != whole), default=0)


def overlap(boxes: Sequence[Box]) -> bool:
    """Whether two of these parts of one tensor have an element in common."""
    some = [box for box in boxes if math.prod(box.sizes)]
    if len(some) < 2 or not some[0].shape:
        return len(some) > 1
    # Few parts reach any one place of the axis that is cut most.
    axis = max(range(len(some[0].shape)), key=lambda axis: len({box.offsets[axis] for box in some}))
    reaching: list[Box] = []
    for box in sorted(some, key=lambda box: box.offsets[axis]):
        reaching = [other for other in reaching if other.offsets[axis] + other.sizes[axis] > box.offsets[axis]]
        if any(_meet(box, other) for other in reaching):
            return True
        reaching.append(box)
    return False


def _meet(a: Box, b: Box) -> bool:
    axes = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(start < other + length and other < start + size for start, size, other, length in axes)
