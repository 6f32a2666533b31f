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
from wnconvert.rounding import root

_TAIL = rows.SEGMENT // 2
"""Elements of which the last sums are made for all rows at once: small ones take longer to call than to add. There is
memory for as many beside a block."""


def of_rows(view: Tensor, kept: int, block: int, scratch: Tensor) -> Tensor:
    """The float64 norms of all rows, in order, as one axis.

    Args:
        view: of any float dtype, its kept axes first.
        kept: number of kept axes.
        block: elements worked on at a time.
        scratch: float64 memory of two elements for each of a block, and of a segment. Overwritten.
    """
    count = math.prod(view.shape[:kept])
    columns = view.numel() // count if count else 0
    if columns > rows.SEGMENT:
        return torch.cat([_of_long_row(row, block, scratch) for row in rows.parts(view, kept, block)])
    if not columns:
        return torch.zeros(count, dtype=torch.float64, device=view.device)
    width = columns
    while width > 1 and width * count > _TAIL:
        width = (width + 1) // 2
    if width * count <= _TAIL:
        totals = scratch[scratch.numel() - width * count :].view(count, width)
    else:
        totals = torch.empty(count, 1, dtype=torch.float64, device=view.device)
    exponents, first = [], 0
    for part in rows.parts(view, kept, block):
        shaped, values = rows.workspace(scratch, part, kept)
        shaped.copy_(_in_float32(part, kept, scratch) if part.dtype == torch.float16 else part)
        number = values.shape[0]
        if part.dtype == torch.float64:
            exponents.append(_scaled(values, part, kept))
            half = sums.halved(values.square_(), width)
        else:
            half = sums.halved_squares(values, width)
        totals[first : first + number] = half
        first += number
    return _root(totals, torch.cat(exponents) if exponents else None)


def _of_long_row(row: Tensor, block: int, scratch: Tensor) -> Tensor:
    """The norm of one row of more than a segment, as one axis."""
    columns, step = row.numel(), max(1, block // rows.SEGMENT) * rows.SEGMENT
    totals = torch.empty(1, -(-columns // rows.SEGMENT), dtype=torch.float64, device=row.device)
    exponent = powers.exponents(row, 0).reshape(1) if row.dtype == torch.float64 else None
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        values = scratch[: stop - start]
        rows.copy_range(row, start, stop, values)
        if exponent is not None:
            values.copy_(powers.ldexp(values, -exponent))
        values.square_()
        whole, done = (stop - start) // rows.SEGMENT, start // rows.SEGMENT
        if whole:
            totals[0, done : done + whole] = sums.tree(values[: whole * rows.SEGMENT].view(whole, rows.SEGMENT))
        rest = values[whole * rows.SEGMENT :]
        if rest.numel():
            totals[0, -1] = sums.tree(rest.view(1, -1))
    return _root(totals, exponent)


def _scaled(values: Tensor, part: Tensor, kept: int) -> Tensor:
    """Scale rows by powers of two so that they stay in the range of float64 when squared. Returns the exponents."""
    exponent = powers.exponents(part, kept).reshape(-1)
    values.copy_(powers.ldexp(values, -exponent.unsqueeze(1)))
    return exponent


def _root(totals: Tensor, exponent: Tensor | None) -> Tensor:
    norm = root(sums.tree(totals))
    return norm if exponent is None else powers.ldexp(norm, exponent)


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
    return _root(totals, None if exponent is None else exponent[:, 0])


def _segment_total(
    read: Callable[[int, int], Tensor], start: int, stop: int, exponent: Tensor | None, width: int
) -> Tensor:
    def squares(first: int, last: int) -> Tensor:
        x = read(start + first, start + last)
        return (x if exponent is None else powers.ldexp(x, -exponent)).square_()

    return sums.tree_by_pieces(squares, stop - start, width)
