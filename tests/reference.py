"""Independent references for the arithmetic: plain float64 torch, no blocks, no tree, none of the package's code."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def bits(t: Tensor) -> Tensor:
    """The elements as integers, so that -0.0 is not 0.0 and NaN is itself."""
    return t.detach().contiguous().view(_INTEGERS[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def ulp(a: Tensor, b: Tensor) -> int:
    """The largest number of representable values between two elements."""
    x, y = bits(a).long(), bits(b).long()
    low = torch.iinfo(bits(a).dtype).min
    x, y = torch.where(x < 0, low - x, x), torch.where(y < 0, low - y, y)
    return int((x - y).abs().max()) if x.numel() else 0


def norm(v: Tensor, kept: tuple[int, ...] | None) -> Tensor:
    """Float64 norm over all axes but the kept ones; None for all axes, 0-d."""
    v = v.double()
    if kept is None:
        return v.pow(2).sum().sqrt()
    reduced = [i for i in range(v.dim()) if i not in kept]
    return v.pow(2).sum(reduced, keepdim=True).sqrt() if reduced else v.abs()


def fold(g: Tensor, v: Tensor, kept: tuple[int, ...] | None) -> Tensor:
    """The contract in one line: v where g is its rounded norm, else the float64 value rounded once."""
    n = norm(v, kept)
    return torch.where(n.to(g.dtype) == g, v, (g.double() * v.double() / n).to(v.dtype))
