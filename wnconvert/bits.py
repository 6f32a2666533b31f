"""Tensors as the integers that their bits are, so that -0.0 is not 0.0 and NaN is itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from wnconvert import rows

BLOCK = 1 << 20
"""Elements compared at a time."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(t: Tensor) -> Tensor:
    """View a tensor of a real dtype of 1, 2, 4 or 8 bytes as integers, without copying it."""
    return t.view(_INTEGERS[t.element_size()])


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype have the same bits."""
    return torch.equal(as_integers(a), as_integers(b))


def differing_bits(a: Tensor, b: Tensor) -> int:
    """Number of elements of two tensors of one shape and dtype that differ in any bit (NaN equals the same NaN)."""
    return sum(int((_as_bits(x) != _as_bits(y)).sum()) for x, y in _blocks(a, b))


def ulp_distance(a: Tensor, b: Tensor) -> int | None:
    """The largest number of representable values between two elements.

    None for tensors that are not floating, and where one side has NaN or infinity and the other has not.
    """
    if not a.is_floating_point() or a.element_size() < 2:
        return None
    largest = 0
    for x, y in _blocks(a, b):
        if bool((x.isfinite() != y.isfinite()).any()):
            return None
        largest = max(largest, int((_ordered(x) - _ordered(y)).abs().max()))
    return largest


def _blocks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut both in the same way, in the order in which `a` lies in memory. What is compared is copied first."""
    if a.layout != torch.strided or a.numel() <= BLOCK:
        yield a, b
        return
    strides = a.stride()
    order = sorted(range(a.dim()), key=lambda i: -strides[i])
    a, b = a.permute(order), b.permute(order)
    for start in range(0, a.numel(), BLOCK):
        stop = min(start + BLOCK, a.numel())
        yield from zip(rows.pieces(a, start, stop), rows.pieces(b, start, stop), strict=True)


def _as_bits(t: Tensor) -> Tensor:
    t = t.detach().cpu().contiguous()
    if t.is_complex():
        t = torch.view_as_real(t).contiguous()
    return t if t.dtype == torch.bool else as_integers(t)


def _ordered(t: Tensor) -> Tensor:
    """Integers in the order of the floats: -0.0 and 0.0 both become 0."""
    integers = _as_bits(t)
    low = torch.iinfo(integers.dtype).min
    return torch.where(integers < 0, low - integers.long(), integers.long())
