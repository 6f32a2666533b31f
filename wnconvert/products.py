"""Multiplying directions with their magnitudes, each element rounded once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wnconvert import bfloat16_rows, half_types, powers, rows
from wnconvert.rounding import HALF, once

_FAR = 1000
"""Exponents up to this far from zero are those of normal float64."""


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
        _multiply_and_divide(_cut(v, out, kept, block), factor, divisor, scratch)
        return
    factor.div_(divisor)
    suits = bfloat16_rows.suits(v, out, factor) and half_types.suits(factor)
    if not suits or not _multiply_rows(factor, v, out, block=block, scratch=scratch):
        _multiply(factor, v, out, kept=kept, block=block, scratch=scratch)


def _multiply_rows(factor: Tensor, v: Tensor, out: Tensor, *, block: int, scratch: Tensor) -> bool:
    """Write the products of long rows of bfloat16, unless too many of them are left to others. Whether that is done."""
    left = bfloat16_rows.undecided(factor, scratch).nonzero()[:, 0]
    if left.numel() > factor.numel() // 4:
        return False
    by_row, target = (t.view(factor.numel(), -1) for t in (v, out))
    x = by_row[left]
    bfloat16_rows.multiply(by_row, factor, target)
    if left.numel():
        w = torch.empty_like(x)
        _multiply(factor[left], x, w, kept=1, block=block, scratch=scratch)
        target[left] = w
    return True


def _multiply(factor: Tensor, v: Tensor, out: Tensor, *, kept: int, block: int, scratch: Tensor) -> None:
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


def _multiply_and_divide(pieces: Iterator[_Piece], factor: Tensor, divisor: Tensor, scratch: Tensor) -> None:
    """Write `x * factor / divisor` for float64, which has no wider type to hold the ratio in.

    Both are scaled by the same power of two first, which brings the divisor to [1/2, 1). Then `x * factor` leaves the
    range only where the weight does.
    """
    exponent = torch.frexp(divisor).exponent
    wanted = torch.frexp(factor).exponent - exponent
    # What is left of the power where the factor itself would leave the range.
    rest = wanted - wanted.clamp(-_FAR, _FAR)
    factor, divisor = powers.ldexp(factor, -exponent - rest), powers.ldexp(divisor, -exponent)
    before, after = (rest.clamp(min=0), rest.clamp(max=0)) if bool(rest.any()) else (None, None)
    for piece in pieces:
        w = rows.workspace(scratch, piece.x, piece.kept)[0].copy_(piece.x)
        if before is not None:
            w.copy_(powers.ldexp(w, piece.along(before[piece.rows])))
        w.mul_(piece.along(factor[piece.rows])).div_(piece.along(divisor[piece.rows]))
        piece.out.copy_(w if after is None else powers.ldexp(w, piece.along(after[piece.rows])))
