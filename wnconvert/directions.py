"""Directions for rows whose own values cannot be one: random for zeros, scaled by a power of two at the edges."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wnconvert import norms, powers, rows
from wnconvert.errors import NotSplittable

PIECE = 1 << 15
"""Elements to ask for at a time, in all rows together: of each, several values in float64 are held."""

_Words = NDArray[np.uint64]


class Directions:
    """The directions of some rows of a weight, made a range of columns at a time.

    Args:
        name: of the weight. The same name and row give the same random numbers.
        numbers: of the rows in the weight, `[rows]`.
        lengths: their norms in float64, `[rows]`.
        columns: elements of each.
    """

    def __init__(self, name: str, numbers: Tensor, lengths: Tensor, columns: int) -> None:
        self._numbers = numbers
        # The norm divided by this power of two is in [1, 2).
        self._exponents = (torch.frexp(lengths).exponent - 1).unsqueeze(1)
        self._zero = lengths == 0
        zeros = numbers[self._zero].numpy(force=True).astype(np.uint64)
        self._keys = _mixed(zeros + (np.uint64(zlib.crc32(name.encode())) << np.uint64(32)))[:, None]
        self._norms = torch.empty(0, 1, dtype=torch.float64)
        if zeros.size:
            width = max(1, PIECE // zeros.size)
            self._norms = norms.of_columns(self._random, columns, torch.float32, width=width).unsqueeze(1)

    def of(self, values: Tensor, start: int = 0) -> Tensor:
        """The directions of all rows in the columns from `start` on.

        Args:
            values: those of the weight, `[rows, columns]`.
            start: number of the first column.

        Raises:
            NotSplittable: a row spans so many powers of two that scaling it would lose some of its values.
        """
        v = powers.ldexp(values.double(), -self._exponents).to(values.dtype)
        exact = powers.ldexp(v.double(), self._exponents).to(values.dtype) == values
        if not bool(exact.all()):
            row = int(self._numbers[~exact.all(1)][0])
            raise NotSplittable(f"row {row} spans more than the exponent range of its dtype, so no v has a finite norm")
        if len(self._keys):
            # Zeros have signs, and `0 * v` gives each of them back.
            random = (self._random(start, start + values.shape[1]) / self._norms).to(values.device)
            v[self._zero] = torch.copysign(random, values[self._zero].double()).to(values.dtype)
        return v

    def _random(self, start: int, stop: int) -> Tensor:
        """Numbers from 2**-10 to 1 + 2**-10 for the rows of zeros, each made of its row and column alone."""
        words = _mixed(self._keys + np.arange(start, stop, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        return torch.from_numpy((words >> np.uint64(11)).astype(np.float64)).mul_(2.0**-53).add_(2.0**-10)


def replace(view: Tensor, kept: int, chosen: Tensor, lengths: Tensor, *, name: str, first: int) -> None:
    """Put their directions in the place of some rows of a weight.

    Args:
        view: the weight, its kept axes first.
        kept: number of kept axes.
        chosen: numbers of the rows in `view`.
        lengths: norms of all of its rows, as one axis.
        name: see `Directions`.
        first: number of the first row of `view` in the weight.

    Raises:
        NotSplittable: see `Directions.of`.
    """
    shape, columns = view.shape[:kept], view.numel() // lengths.numel()
    step = max(1, PIECE // columns)
    for start in range(0, chosen.numel(), step):
        some = chosen[start : start + step]
        # By a number the row is not copied: it may be long.
        index = rows.index_of(int(some), shape) if step == 1 else rows.index_of(some, shape)
        made, own = Directions(name, some + first, lengths[some], columns), view[index]
        flat = own.reshape(some.numel(), columns)
        for column in range(0, columns, PIECE):
            part = flat[:, column : column + PIECE]
            part.copy_(made.of(part, column))
        # Onto itself, torch does not copy what has an axis of one element with another stride.
        if flat.untyped_storage().data_ptr() != view.untyped_storage().data_ptr():
            view[index] = flat.view(own.shape)


def _mixed(words: _Words) -> _Words:
    """Hashes of 64 bits: the mixing function of splitmix64 (Steele, Lea & Flood 2014, section 3), variant 13."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return words ^ (words >> np.uint64(31))
