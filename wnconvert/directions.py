"""Random directions for rows of zeros."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from wnconvert import rows, sums
from wnconvert.rounding import root


class Direction:
    """A random unit vector for one row of zeros, made a piece at a time. The same name and row give the same vector."""

    def __init__(self, name: str, row: int, size: int) -> None:
        self._seed = zlib.crc32(f"{name} {row}".encode())
        self._size = size
        totals = torch.empty(1, -(-size // rows.SEGMENT), dtype=torch.float64)
        for i, sample in enumerate(self._samples(rows.SEGMENT)):
            totals[0, i] = sums.tree(sample.square_().view(1, -1))[0]
        self._norm = root(sums.tree(totals))

    def pieces(self, size: int) -> Iterator[Tensor]:
        """Yield the elements in order, in float64, `size` at a time."""
        return (sample / self._norm for sample in self._samples(size))

    def _samples(self, size: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self._seed)
        for start in range(0, self._size, size):
            count = min(size, self._size - start)
            yield torch.rand(count, generator=generator, dtype=torch.float64).add_(2**-10)


def signed(direction: Tensor, zeros: Tensor) -> Tensor:
    """Give a direction the signs of the zeros it stands for, so that `0 * v` gives each of them back with its sign."""
    return torch.copysign(direction.to(zeros.device).reshape(zeros.shape), zeros.double()).to(zeros.dtype)
