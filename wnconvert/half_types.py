"""Products of half types, rounded once as `rounding.once` does, but computed in float32 for the most part.

A product in float32 is off by at most one and a half of its last places: up to one for the rounding of the factor, and
half of one for its own. It decides the rounding to a half type unless it lies that close to the middle between two
values of that type. Those elements (one in thirteen thousand of bfloat16, about one in a thousand of float16) are
computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wnconvert import checks, rows
from wnconvert.rounding import once

_LARGE = 2.0**40
"""Between this and its reciprocal, factors are normal in float32, and so are their products with values of float16."""

_OFF = 2
"""Last places that a product in float32 may be off."""

_RUN = 128
"""Elements looked at as one."""

_HELD = 1 << 16
"""Elements that wait to be computed in float64: together takes one call, but no memory without bounds."""

_EPS = torch.finfo(torch.float32).eps
_LEAST = torch.iinfo(torch.int32).min

SPARE = 3 * _RUN
"""Elements of memory beside those that a part needs."""


def suits(factor: Tensor) -> bool:
    """Whether these factors, in float64, can be used in float32. Zeros can."""
    size = factor.abs()
    least, most = checks.extremes(size)
    if least == 0:
        least = float(size.where(size != 0, most).amin())
    return least > 1 / _LARGE and most < _LARGE


class Products:
    """The products of some rows with their factors, made a piece at a time.

    Args:
        factor: float64, one per row as one axis, such that they suit.
        out: float16 or bfloat16, where they go, its kept axes first.
    """

    def __init__(self, factor: Tensor, out: Tensor) -> None:
        self._factor, self._out = factor, out
        self._columns = out.numel() // factor.numel()
        self._single = factor.float()
        # Moved up by this, what is near a middle of bfloat16 comes right after the least integer.
        self._moved = torch.tensor(_OFF << 16, dtype=torch.int32, device=out.device)
        self._open: list[tuple[Tensor, Tensor]] = []

    def multiply(self, x: Tensor, out: Tensor, start: int, *, kept: int, scratch: Tensor) -> bool:
        """Write the products of whole rows, or of a part of one, unless float32 leaves too many open.

        Args:
            x: finite, of the dtype of `out`.
            out: a part of the whole `out`, or `x` itself.
            start: number of its first element in the whole `out`, in logical order.
            kept: axes of `x` that tell rows apart.
            scratch: float64 memory of two elements for each of `x`, and `SPARE` more. Overwritten.

        Returns:
            Whether it is done. Else `out` is as it was.
        """
        size, first = x.numel(), start // self._columns
        whole = -(-size // _RUN) * _RUN
        single = scratch.view(torch.float32)
        products, rest = single[:whole], single[whole:]
        products[size:] = 0
        result, by_row = rows.workspace(products, x, kept)
        result.copy_(x)
        by_row.mul_(self._single[first : first + by_row.shape[0]].unsqueeze(1))
        margin, limit = self._to_middles(products, rest) if x.dtype == torch.bfloat16 else _to_others(products, rest)
        runs = (margin.amin(1) < limit).nonzero()[:, 0]
        if runs.numel() > margin.shape[0] // 2:
            return False
        if runs.numel():
            run, within = (margin[runs] < limit).nonzero().unbind(1)
            where = runs[run] * _RUN + within
            if where.numel() > size // 16:
                return False
            if not by_row.is_contiguous():
                where = where % by_row.shape[0] * self._columns + where // by_row.shape[0]
            self._open.append((where + start, x[rows.index_of(where, x.shape)]))
        out.copy_(result)
        if sum(where.numel() for where, _ in self._open) > _HELD:
            self.finish()
        return True

    def finish(self) -> None:
        """Write the elements of these pieces that float32 did not decide. Comes after the last one."""
        if self._open:
            where, x = (torch.cat(parts) for parts in zip(*self._open, strict=True))
            exact = x.double() * self._factor[where // self._columns]
            self._out[rows.index_of(where, self._out.shape)] = once(exact, self._out.dtype)
            self._open.clear()

    def _to_middles(self, products: Tensor, memory: Tensor) -> tuple[Tensor, int]:
        """Tell which products may come to the wrong value of bfloat16: integers, in runs, and what theirs are below.

        That is the upper half of a float32, also where it is subnormal. So the lower half tells: it is near 2**15.
        """
        lower = memory[: products.numel()].view(torch.int32)
        torch.add(self._moved, products.view(torch.int32), alpha=1 << 16, out=lower)
        return lower.view(-1, _RUN), _LEAST + (2 * _OFF << 16) + 1


def _to_others(products: Tensor, memory: Tensor) -> tuple[Tensor, int]:
    """Tell which products come to different values of float16 if they are a little smaller or larger, as above.

    Rounding does not change the order of numbers, so the others come to what the exact product comes to.
    """
    size = products.numel()
    scaled, bounds = memory[:size], memory[size : 2 * size].view(torch.float16).view(2, size)
    for bound, by in zip(bounds, (1 - _OFF * _EPS, 1 + _OFF * _EPS), strict=True):
        bound.copy_(torch.mul(products, by, out=scaled))
    # Of one sign, bits as integers are in the order of the sizes.
    lower, upper = bounds.view(torch.int16)
    return lower.sub_(upper).view(-1, _RUN), 0
