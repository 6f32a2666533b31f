"""Rounding float64 once, to nearest with ties to even, whatever library torch was built with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in another dtype, each element rounded once.

    torch goes from float64 to the half types by way of float32, where an element that comes to lie halfway between two
    of theirs is rounded a second time. So the first step rounds to odd here, which keeps such elements off the middle
    (Boldo & Melquiond 2008, "Emulation of FMA and correctly rounded sums", theorem 3).

    Args:
        x: float64, any shape.
        dtype: float64, float32, float16 or bfloat16.
    """
    if dtype not in HALF:
        return x.to(dtype)
    nearest = x.float()
    # The difference is exact. NaN compares false; infinity itself differs by NaN.
    rest = x - nearest.double()
    even = (nearest.view(torch.int32) & 1) == 0
    odd = torch.nextafter(nearest, torch.where(rest > 0, torch.inf, -torch.inf).to(nearest.dtype))
    return torch.where((rest.abs() > 0) & even, odd, nearest).to(dtype)


def root(x: Tensor) -> Tensor:
    """The square roots of float64. The vector library in some builds of torch for CPU is off by an ulp in places."""
    return torch.as_tensor(np.sqrt(x.numpy())) if x.device.type == "cpu" else x.sqrt()
