"""Products of whole rows of bfloat16 with their factors, rounded once, in one pass over memory.

A value of bfloat16 has one of 128 significands, so the factor of a row alone tells whether any product in float32 can
come so close to the middle between two values of bfloat16 that rounding it once more goes wrong. One row in twenty-five
has such a significand, whether or not the row holds it. Those rows are left to others.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

COLUMNS = 1024
"""In shorter rows, 128 significands take longer to look at than the row itself."""

_OFF = 512
"""How far a product in float32 may be off, where 2**24 is the last place of bfloat16: up to 255 for the rounding of the
factor, and up to 128 for its own. A subnormal product may be off by 256 for its own where 2**25 is the last place."""

_TOGETHER = 256
"""Rows looked at together: their 128 products stay in the cache."""


def suits(v: Tensor, out: Tensor, factor: Tensor) -> bool:
    """Whether `multiply` is for these rows, their factors as one axis."""
    same = v.dtype == out.dtype == torch.bfloat16 and v.is_contiguous() and out.is_contiguous()
    # torch gives each row to one thread.
    several = 1 < factor.numel() <= v.numel() // COLUMNS
    return same and several and v.device.type == "cpu" and _exact()


def undecided(factor: Tensor, scratch: Tensor) -> Tensor:
    """Which rows float32 does not decide, if they hold the wrong values.

    Args:
        factor: float64, one per row as one axis, that `half_types` may use in float32.
        scratch: float64 memory of a segment. Overwritten.
    """
    single = factor.float()
    significand = single.view(torch.int32) & 0x7FFFFF
    powers = (significand == 0) & (single == factor)
    significand.bitwise_or_(1 << 23)
    memory = scratch[: _TOGETHER * 128 * 3 // 2].view(torch.int32).view(3, _TOGETHER, 128)
    near = torch.empty_like(powers)
    for start in range(0, near.numel(), _TOGETHER):
        part = significand[start : start + _TOGETHER]
        near[start : start + _TOGETHER] = _near(part, memory[:, : part.numel()])
    return near & ~powers & (factor != 0)


def _near(significand: Tensor, memory: Tensor) -> Tensor:
    """Which of these significands of 24 bits have a product with one of 8 bits that comes near to a middle."""
    product, nearest, lowest = memory
    # Integers of 32 bits that wrap, from 2**31 up in the end: of a normal product, bfloat16 keeps the upper 8 bits.
    torch.mul(significand.unsqueeze(1), torch.arange(128, 256, dtype=torch.int32), out=product)
    product.add_(torch.clamp(product, min=0, out=lowest)).add_(1 << 23)
    # Of a subnormal product it keeps fewer. A number of 8 bits is a middle where its lowest bit is the first to go,
    # and float32 has as many bits less. (0 stands for 256; the signs above do not change the lowest bit.)
    torch.bitwise_right_shift(product, 24, out=nearest).bitwise_or_(0x100)
    torch.neg(nearest, out=lowest).bitwise_and_(nearest)
    rest = product.bitwise_and_(0xFFFFFF).sub_(1 << 23).abs_()
    near = torch.sub(rest, lowest, alpha=_OFF, out=lowest).amin(1) <= 0
    return near.logical_or_(rest.amax(1) >= (1 << 23) - _OFF)


def multiply(x: Tensor, factor: Tensor, out: Tensor) -> None:
    """Write the products of rows that float32 decides.

    Args:
        x: finite, `[rows, columns]`, contiguous.
        factor: as above.
        out: like `x`, or `x` itself.
    """
    # The one function of torch that takes such rows with factors in float32, and rounds once at the end. It adds
    # `bias - mean * weight`, which is -0 here whatever the sign of the weight: that leaves the sign of zeros alone.
    weight = factor.float()
    nothing = weight.new_empty(0)
    mean, variance = torch.zeros_like(weight).copysign_(weight), torch.ones_like(weight)
    bias = torch.full_like(weight, -0.0)
    into, stacked = (out.view(1, *out.shape), nothing, nothing), x.view(1, *x.shape)
    torch.native_batch_norm(stacked, weight, bias, mean, variance, False, 0.0, 0.0, out=into)


@functools.cache
def _exact() -> bool:
    """Whether this build of torch does multiply so: it promises nothing of the kind."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    # A few more, which do not fill a vector.
    x = torch.cat([x, x[16200:16207]])
    x = x.where(x.isfinite(), 0).repeat(4, 1)
    factor = torch.tensor([1.0, -1.2345678, 2.0**-30 / 3, 2.0**30 / 3], dtype=torch.float64)
    expected = (x.float() * factor.float().unsqueeze(1)).to(x.dtype)
    try:
        multiply(x, factor, x)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    return torch.equal(x.view(torch.int16), expected.view(torch.int16))
