"""Exact scaling by powers of two, for rows at the edges of the number formats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wnconvert import checks
from wnconvert.rounding import once

# Norms whose squares neither under- nor overflow where a runtime computes them. Half types are widened to float32
# before they are squared (torch, ONNX Runtime), so float16 cannot leave the range.
SAFE_NORM = {
    torch.float64: (2.0**-450, 2.0**450),
    torch.float32: (2.0**-50, 2.0**60),
    torch.bfloat16: (2.0**-50, 2.0**60),
    torch.float16: (0.0, math.inf),
}


def outside(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Which magnitudes, in float64 and not negative, leave the range that is safe for a dtype."""
    low, high = SAFE_NORM[dtype]
    return (size < low) | (size > high)


def ordinary(g: Tensor, dtype: torch.dtype) -> bool:
    """Whether all magnitudes are above zero and in the safe range of a dtype that can hold them."""
    low, high = checks.extremes(g)
    least, most = SAFE_NORM[dtype]
    return low > 0 and low >= least and high <= min(most, torch.finfo(dtype).max)


def exponents(part: Tensor, kept: int) -> Tensor:
    """Per row, the power of two that brings its largest element near 1, or 0 where none is needed."""
    axes = tuple(range(kept, part.dim()))
    largest = torch.maximum(part.amax(axes), -part.amin(axes)) if axes else part.abs()
    exponent = torch.frexp(largest).exponent
    return torch.where((exponent.abs() > 400) & largest.isfinite(), exponent, 0)


def ldexp(x: Tensor, exponent: Tensor) -> Tensor:
    """`x * 2**exponent` in float64, in two steps because 2**1074 is not a float64. Exact unless the result is not."""
    first, second = factors(exponent)
    return x * first * second


def factors(exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Two float64 powers of two whose product is `2**exponent`, for exponents between any two float64."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    return power(half), power(exponent - half)


def power(exponent: Tensor) -> Tensor:
    """`2**exponent` in float64, for integers from -1022 to 1023, made of its bits."""
    return (exponent.long() + 1023 << 52).view(torch.float64)


def recognise(g: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Recognise rows that `split` scaled: `w` is `v * 2**k` exactly. Returns k per row, 0 for others, None if none is.

    Such a row has a `g` outside the safe range, `||v||` in [1, 2], and `g` is the rounded value of `||v|| * 2**k`. The
    largest such k is the right one: where `g` is subnormal a smaller one may round to the same `g`, but stands for a
    row whose norm is below its own largest element.
    """
    size = g.double().abs()
    if ordinary(size, dtype):
        return None
    candidate = (g > 0) & outside(size, dtype) & (norm >= 1 - 2**-8) & (norm <= 2 + 2**-8)
    if not bool(candidate.any()):
        return None
    found = torch.zeros_like(norm)
    nearest = (torch.frexp(size).exponent - torch.frexp(norm).exponent).double()
    for offset in (-1, 0, 1):
        k = nearest + offset
        found = torch.where(candidate & (once(ldexp(norm, k), g.dtype) == g), k, found)
    return found
