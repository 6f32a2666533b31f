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


def once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 rounded once, to nearest, ties to even: the nearest of three values, since torch's own is off by one."""
    if dtype not in (torch.float16, torch.bfloat16):
        return x.to(dtype)
    size, close = x.abs(), bits(x.abs().to(dtype)).int()
    found, least = torch.zeros_like(close), torch.full_like(size, torch.inf)
    beyond = 2.0**16 if dtype == torch.float16 else 2.0**128
    for step in (-1, 0, 1):
        candidate = (close + step).clamp(0, int(bits(torch.tensor(torch.inf, dtype=dtype))))
        value = candidate.short().view(dtype).double()
        # What is as far beyond the largest value as that is beyond the one below it rounds to infinity.
        away = (size - torch.where(value.isinf(), beyond, value)).abs()
        better = (away < least) | ((away == least) & (candidate % 2 == 0))
        found, least = torch.where(better, candidate, found), torch.where(better, away, least)
    rounded = found.short().view(dtype)
    return torch.where(x.isfinite(), torch.copysign(rounded, x.to(dtype)), x.to(dtype))


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
    return torch.where(once(n, g.dtype) == g, v, once(g.double() * v.double() / n, v.dtype))
