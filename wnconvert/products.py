"""Multiplying directions with their magnitudes, each element rounded once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wnconvert import half_types, powers, rows
from wnconvert.rounding import HALF, once


def fold_rows(g: Tensor, v: Tensor, norm: Tensor, out: Tensor, *, kept: int, block: int, scratch: Tensor) -> None:
    """Write the weights of some rows into `out`.

    Args:
        g: magnitudes, as one axis.
        v: directions, their kept axes first.
        norm: float64, of the rows of `v`, as one axis.
        out: of the shape and dtype of `v`, or `v` itself.
        kept: number of kept axes.
        block: elements worked on at a time.
        scratch: float64 memory of two elements for each of a block, and of a segment. Overwritten.
    """
    fresh = once(norm, g.dtype) == g
    if bool(fresh.all()):
        # The result may go into v itself.
        if out.data_ptr() != v.data_ptr():
            out.copy_(v)
        return
    factor, divisor = _factors(g, norm, v.dtype, fresh)
    if v.dtype == torch.float64:
        for piece in _cut(v, out, kept, block):
            _in_its_own_dtype(piece, factor[piece.rows], divisor[piece.rows], scratch)
        return
    factor.div_(divisor)
    half = half_types.Products(factor, out) if v.dtype in HALF and half_types.suits(factor) else None
    for piece in _cut(v, out, kept, block):
        if half and half.multiply(piece.x, piece.out, piece.start, kept=piece.kept, scratch=scratch):
            continue
        w = rows.workspace(scratch, piece.x, piece.kept)[0].copy_(piece.x).mul_(piece.along(factor[piece.rows]))
        piece.out.copy_(once(w, v.dtype) if v.dtype in HALF else w)
    if half:
        half.finish()


class _Piece(NamedTuple):
    """Some rows, or a part of one row.

    Attributes:
        x: what is multiplied.
        out: where the result goes.
        start: number of its first element, in logical order.
        rows: the numbers of its rows.
        kept: axes of `x` that tell them apart.
    """

    x: Tensor
    out: Tensor
    start: int
    rows: slice
    kept: int

    def along(self, factor: Tensor) -> Tensor:
        """One value for each row, in the shape that goes with `x`."""
        return factor.reshape((*self.x.shape[: self.kept], *(1,) * (self.x.dim() - self.kept)))


def _cut(v: Tensor, out: Tensor, kept: int, block: int) -> Iterator[_Piece]:
    count, start = math.prod(v.shape[:kept]), 0
    if count > 1:
        for x, y in zip(rows.parts(v, kept, block), rows.parts(out, kept, block), strict=True):
            first = start * count // v.numel()
            yield _Piece(x, y, start, slice(first, first + math.prod(x.shape[:kept])), kept)
            start += x.numel()
        return
    step = max(block, rows.SEGMENT)
    for stop in range(step, v.numel() + step, step):
        for x, y in zip(*(rows.pieces(t, start, min(stop, t.numel())) for t in (v, out)), strict=True):
            yield _Piece(x, y, start, slice(0, 1), 0)
            start += x.numel()


def _factors(g: Tensor, norm: Tensor, dtype: torch.dtype, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Per row, what to multiply `v` by and then divide it by: `(g, ||v||)`, or a pair that gives `w` exactly.

    - Where `g` is the rounded norm, nothing has trained: `(1, 1)`. That includes rows of zeros.
    - Where `split` scaled `v` by a power of two: that power, taken back.
    """
    multiply, divide = g.double(), norm
    power = powers.recognise(g, norm, dtype)
    if power is not None:
        first, second = powers.factors(power)
        multiply, divide = torch.where(power != 0, first, multiply), torch.where(power != 0, 1 / second, divide)
    return torch.where(fresh, 1.0, multiply), torch.where(fresh, 1.0, divide)


def _in_its_own_dtype(piece: _Piece, factor: Tensor, divisor: Tensor, scratch: Tensor) -> None:
    """Write `x * factor / divisor` for float64, which has no wider type to hold the ratio in."""
    factor, divisor = piece.along(factor), piece.along(divisor)
    w = rows.workspace(scratch, piece.x, piece.kept)[0].copy_(piece.x).mul_(factor).div_(divisor)
    # g * v may leave the range of float64 although the weight does not; v / ||v|| cannot.
    wide = (factor.abs() > 2.0**400) | (divisor > 2.0**400) | (divisor < 2.0**-400)
    piece.out.copy_(torch.where(wide, factor * (piece.x / divisor), w) if bool(wide.any()) else w)
