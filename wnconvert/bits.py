"""Tensors as the integers that their bits are, so that -0.0 is not 0.0 and NaN is itself."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(t: Tensor) -> Tensor:
    """View a tensor of a real dtype of 1, 2, 4 or 8 bytes as integers, without copying it."""
    return t.view(_INTEGERS[t.element_size()])


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype have the same bits."""
    return torch.equal(as_integers(a), as_integers(b))


def differing_bits(a: Tensor, b: Tensor) -> int:
    """Number of elements of two tensors of one shape and dtype that differ in any bit (NaN equals the same NaN)."""
    return int((_as_bits(a) != _as_bits(b)).sum())


def ulp_distance(a: Tensor, b: Tensor) -> int | None:
    """The largest number of representable values between two elements.

    None for tensors that are not floating, and where one side has NaN or infinity and the other has not.
    """
    if not a.is_floating_point() or a.element_size() < 2 or bool((a.isfinite() != b.isfinite()).any()):
        return None
    return int((_ordered(a) - _ordered(b)).abs().max())


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
