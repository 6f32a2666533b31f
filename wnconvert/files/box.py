"""A part of a tensor: a range along each of its axes. Nothing here imports torch."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True, slots=True)
class Box:
    """A part of a tensor.

    Attributes:
        shape: of the tensor.
        offsets: where in the tensor the part begins.
        sizes: its shape.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield which of the elements `start..stop` of the tensor the part has. All counts are in row-major order.

        In the part, each stretch follows the one before it.

        Yields:
            The number of an element in the tensor, its number in the part, and how many follow one another in both.
        """
        # What is side by side in the part is side by side in the tensor from the last axis that is cut.
        cut = max((i for i, whole in enumerate(self.shape) if self.sizes[i] != whole), default=0)
        length = math.prod(self.sizes[cut:])
        runs = range(math.prod(self.sizes[:cut]) if length and start < stop else 0)
        for run in runs[bisect.bisect_right(runs, start - length, key=lambda run: self._place(run, cut)) :]:
            place = self._place(run, cut)
            if place >= stop:
                return
            low, high = max(place, start), min(place + length, stop)
            yield low, run * length + low - place, high - low

    def _place(self, run: int, cut: int) -> int:
        """Number in the tensor of the first element of a run: of what is side by side."""
        place, pitch = 0, math.prod(self.shape[cut:])
        if cut < len(self.shape):
            place = self.offsets[cut] * math.prod(self.shape[cut + 1 :])
        for axis in reversed(range(cut)):
            run, index = divmod(run, self.sizes[axis])
            place += (self.offsets[axis] + index) * pitch
            pitch *= self.shape[axis]
        return place
