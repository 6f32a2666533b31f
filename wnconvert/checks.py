"""What a pair and its values must be so that the weight can be told from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wnconvert.errors import PairError
from wnconvert.sites import Axis, pair_axis

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes that have a weight normalization."""


def open_pair(g: Tensor, v: Tensor, name: str, first: int = 0) -> tuple[int, Axis]:
    """The groups and the axis of a pair (see `pair_axis`). Raises `PairError` for what `fold` tells without a norm."""
    groups, axis = pair_axis(g.shape, v.shape, name)
    if v.dtype not in DTYPES or g.dtype not in DTYPES:
        raise PairError(
            f"{name}: g is {g.dtype} and v is {v.dtype}; both must be float64, float32, float16 or bfloat16"
        )
    if v.is_meta or v.layout != torch.strided:
        raise PairError(f"{name}: v {'has no data (meta device)' if v.is_meta else f'is {v.layout}, not strided'}")
    require_magnitudes(g.detach().reshape(-1), v.dtype, name, first)
    return groups, axis


def require_magnitudes(g: Tensor, dtype: torch.dtype, name: str, first: int = 0) -> None:
    """Raise `PairError` for a magnitude that is not finite in the dtype of the direction."""
    low, high = extremes(g.to(dtype))
    if math.isfinite(low) and math.isfinite(high):
        return
    require(g.isfinite(), PairError, f"{name}: row {{}} of g is NaN or infinite", first)
    require(g.to(dtype).isfinite(), PairError, f"{name}: row {{}} of g overflows the {dtype} of v", first)


def require_directions(norm: Tensor, g: Tensor, name: str, first: int = 0) -> None:
    """Raise `PairError` for a row without a direction: not finite, or zero where its magnitude is not."""
    low, high = extremes(norm)
    if low > 0 and high < math.inf:
        return
    require(norm.isfinite(), PairError, f"{name}: row {{}} of v holds NaN or infinity", first)
    require((norm != 0) | (g == 0), PairError, f"{name}: row {{}} of v is zero but its g is not", first)


def extremes(x: Tensor) -> tuple[float, float]:
    """The least and the largest value; both NaN if there is one, and zero if there is no value."""
    low, high = x.double().aminmax() if x.numel() else (0.0, 0.0)
    return float(low), float(high)


def require(good: Tensor, error: type[Exception], message: str, first: int = 0) -> None:
    """Raise an error for the first row that is not good. Its number, counted from `first`, goes into the message."""
    if not bool(good.all()):
        row = first + int((~good.flatten()).nonzero()[0])
        raise error(message.format(row))
