"""The one order in which squares are added: the upper half of a row onto its lower half until one value is left."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def tree(x: Tensor) -> Tensor:
    """Sum over axis 1 by adding the upper half to the lower half until one column is left. Overwrites `x`."""
    return halved(x, 1)[:, 0]


def halved(x: Tensor, width: int) -> Tensor:
    """The columns that are left of `x` on the way of `tree` when they are at most `width`. Overwrites `x`."""
    n = x.shape[1]
    while n > width:
        half = (n + 1) // 2
        # In one call: `+=` on a slice would copy the result onto itself.
        x.narrow(1, 0, n - half).add_(x.narrow(1, half, n - half))
        n = half
    return x.narrow(1, 0, n)


def halved_squares(x: Tensor, width: int) -> Tensor:
    """The same of the squares of `x`, which must be exact in its dtype: then it does not matter where they are made."""
    n = x.shape[1]
    if n <= width:
        return x.square_()
    half = (n + 1) // 2
    lower, upper = x.narrow(1, 0, half), x.narrow(1, half, n - half)
    lower.square_()
    lower.narrow(1, 0, n - half).addcmul_(upper, upper)
    return halved(lower, width)


def tree_by_pieces(read: Callable[[int, int], Tensor], columns: int, width: int) -> Tensor:
    """The same sum, bit for bit, of rows that are read a few columns at a time, each column once.

    Args:
        read: gives a new float64 tensor `[rows, stop - start]` with the columns `start..stop`.
        columns: of the rows.
        width: columns to read at a time. About log2(columns / width) such pieces are held.
    """
    lengths = [columns]
    while lengths[-1] > width:
        lengths.append((lengths[-1] + 1) // 2)

    def value(level: int, start: int, stop: int) -> Tensor:
        """Columns `start..stop` as they are after so many halvings."""
        if level == 0:
            return read(start, stop)
        x = value(level - 1, start, stop)
        low, high = start + lengths[level], min(stop + lengths[level], lengths[level - 1])
        if low < high:
            x[:, : high - low].add_(value(level - 1, low, high))
        return x

    return tree(value(len(lengths) - 1, 0, lengths[-1]))
