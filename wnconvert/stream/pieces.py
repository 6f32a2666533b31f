"""Cutting a weight into pieces that can be worked on one after the other.

A weight is a stack of blocks along its leading kept axes; each block holds all elements of its rows. A run of blocks is
contiguous in the file and a smaller weight of its own. Where one block alone is too large to hold, it is seen as
`[before, rows, after]` and read by strides: a *slab* is a range of its rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from wnconvert.sites import Axis, kept_axes

RUN = 8 << 20
"""Bytes of a run of blocks: enough to outweigh the calls."""

HELD = 16 << 20
"""Bytes of a block that is still held as a whole."""

SLAB = 1 << 17
"""Elements of a slab at a time. A tree over columns holds up to 17 of them in float64."""


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Some blocks of a weight, contiguous in its file.

    Attributes:
        start: first element.
        shape: as a weight of its own, in the view of its groups: `[blocks, *rest]`.
        axis: kept axes of that.
        row: number of its first row.
        rows: number of rows.
    """

    start: int
    shape: tuple[int, ...]
    axis: Axis
    row: int
    rows: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Slab:
    """Some rows of a block that is too large to hold: `[before, row..row + rows of block_rows, after]`.

    Attributes:
        start: first element of the block.
        before: elements of each row are spread over so many places
        block_rows: rows of the block.
        after: with so many side by side.
        offset: first row in the block.
        row: number of that row in the weight.
        rows: number of rows.
    """

    start: int
    before: int
    block_rows: int
    after: int
    offset: int
    row: int
    rows: int

    @property
    def columns(self) -> int:
        """Elements of each row."""
        return self.before * self.after

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.columns * self.rows


def cut(
    shape: tuple[int, ...],
    axis: Axis,
    groups: int,
    itemsize: int,
    *,
    run: int = RUN,
    held: int = HELD,
    slab: int = SLAB,
) -> Iterator[Run | Slab]:
    """Cut a weight, in the order of its rows.

    Args:
        shape: of the weight.
        axis: see `weightnorm.split`, as for `groups`.
        groups: above 1, the axis refers to the weight seen in groups.
        itemsize: bytes of an element.
        run: bytes of a run.
        held: bytes of a block that is held as a whole.
        slab: elements of a slab at a time.
    """
    seen = (groups, shape[0] // groups, *shape[1:]) if groups > 1 else shape
    kept = kept_axes(axis, len(seen))
    lead = _leading(seen, kept)
    blocks, rest = math.prod(seen[:lead]), seen[lead:]
    kept_rest = tuple(i - lead for i in kept if i >= lead)
    block_size = math.prod(rest)
    block_rows = math.prod(rest[i] for i in kept_rest)
    if not blocks or not block_size:
        return
    folded = _as_three(rest, kept_rest)
    if folded is None or block_size * itemsize <= held:
        step = max(1, run // (block_size * itemsize))
        for first in range(0, blocks, step):
            count = min(step, blocks - first)
            run_axis = (0, *(i + 1 for i in kept_rest)) if lead else kept_rest
            run_shape = (count, *rest) if lead else rest
            yield Run(first * block_size, run_shape, run_axis or None, first * block_rows, count * block_rows)
        return
    before, rows, after = folded
    for block in range(blocks):
        yield from _slabs(block, before, rows, after, slab)


def _slabs(block: int, before: int, rows: int, after: int, slab: int) -> Iterator[Slab]:
    step = max(1, min(rows, slab // min(after, slab)))
    for offset in range(0, rows, step):
        count = min(step, rows - offset)
        yield Slab(block * before * rows * after, before, rows, after, offset, block * rows + offset, count)


def _leading(seen: tuple[int, ...], kept: tuple[int, ...]) -> int:
    """How many leading axes are kept. An axis of length 1 after them may count as kept: it changes nothing."""
    lead = 0
    while lead < len(seen) and lead in kept:
        lead += 1
    return lead


def _as_three(shape: tuple[int, ...], kept: tuple[int, ...]) -> tuple[int, int, int] | None:
    """See a block as `[before, rows, after]`, or None where its kept axes are not side by side."""
    places = [i for i, n in enumerate(shape) if n > 1 and i in kept]
    if not places:
        return 1, 1, math.prod(shape)
    first, last = places[0], places[-1]
    if any(i not in kept and shape[i] > 1 for i in range(first, last)):
        return None
    return math.prod(shape[:first]), math.prod(shape[first : last + 1]), math.prod(shape[last + 1 :])
