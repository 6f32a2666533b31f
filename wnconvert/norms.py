"""The one norm: in float64, its squares added in an order that depends on nothing but the number of elements.

Squares are added in a fixed tree over the logical order of the elements, with elementwise additions only. Memory
layout, block size, number of threads and device cannot change its bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from wnconvert import powers, rows, sums


def of_rows(view: Tensor, kept: int, block: int, scratch: Tensor) -> Tensor:
    """The float64 norms of all rows, in order, as one axis. Overwrites `scratch`."""
    found = torch.empty(math.prod(view.shape[:kept]), dtype=torch.float64, device=view.device)
    first = 0
    for part in rows.parts(view, kept, block):
        norm = of_part(part, kept, scratch)
        found[first : first + norm.numel()] = norm
        first += norm.numel()
    return found


def of_part(part: Tensor, kept: int, scratch: Tensor) -> Tensor:
    """The float64 norm of each row of one part, as one axis. Overwrites `scratch`, of twice as many elements."""
    count = math.prod(part.shape[:kept])
    columns = part.numel() // count
    if columns == 0:
        return torch.zeros(count, dtype=torch.float64, device=part.device)
    # Only float64 itself can leave the range of float64 when squared; scaling by a power of two is exact.
    exponent = powers.exponents(part, kept).reshape(count, 1) if part.dtype == torch.float64 else None
    totals = torch.empty(count, -(-columns // rows.SEGMENT), dtype=torch.float64, device=part.device)
    for i in range(totals.shape[1]):
        start, stop = i * rows.SEGMENT, min((i + 1) * rows.SEGMENT, columns)
        if count > 1:
            shaped, segment = rows.workspace(scratch, part, kept)
            shaped.copy_(_in_float32(part, kept, scratch) if part.dtype == torch.float16 else part)
        else:
            segment = scratch[: stop - start].view(1, -1)
            rows.copy_range(part, start, stop, segment[0])
        if exponent is not None:
            segment.copy_(powers.ldexp(segment, -exponent))
        totals[:, i] = sums.tree(segment.square_())
    norm = sums.tree(totals).sqrt()
    return norm if exponent is None else powers.ldexp(norm, exponent[:, 0])


def _in_float32(part: Tensor, kept: int, scratch: Tensor) -> Tensor:
    """A part in the upper half of `scratch`. From there, unlike from float16, torch converts to float64 in vectors."""
    upper = scratch[scratch.numel() // 2 :].view(torch.float32)
    return rows.workspace(upper, part, kept)[0].copy_(part)


def of_columns(read: Callable[[int, int], Tensor], columns: int, dtype: torch.dtype, *, width: int) -> Tensor:
    """The float64 norms of some rows, bit for bit, that are read a few columns at a time.

    Args:
        read: gives a new float64 tensor `[rows, stop - start]` with the columns `start..stop` of the rows.
        columns: of the rows.
        dtype: of the weight.
        width: columns to read at a time.
    """
    exponent: Tensor | None = None
    if dtype == torch.float64:
        largest = torch.zeros((), dtype=dtype)
        for start in range(0, columns, width):
            x = read(start, min(start + width, columns))
            largest = torch.maximum(largest, torch.maximum(x.amax(1), -x.amin(1)))
        exponent = powers.exponents(largest.reshape(-1, 1), 1).reshape(-1, 1)
    totals = torch.empty(0, dtype=torch.float64)
    for i, start in enumerate(range(0, columns, rows.SEGMENT)):
        total = _segment_total(read, start, min(start + rows.SEGMENT, columns), exponent, width)
        if not i:
            # Made once: small tensors that stay would scatter the large ones between them over the heap.
            totals = torch.empty(total.shape[0], -(-columns // rows.SEGMENT), dtype=torch.float64)
        totals[:, i] = total
    norm = sums.tree(totals).sqrt()
    return norm if exponent is None else powers.ldexp(norm, exponent[:, 0])


def _segment_total(
    read: Callable[[int, int], Tensor], start: int, stop: int, exponent: Tensor | None, width: int
) -> Tensor:
    def squares(first: int, last: int) -> Tensor:
        x = read(start + first, start + last)
        return (x if exponent is None else powers.ldexp(x, -exponent)).square_()

    return sums.tree_by_pieces(squares, stop - start, width)
