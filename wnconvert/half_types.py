"""Products of half types, rounded once as `rounding.once` does, but computed in float32 for the most part.

A product in float32 is off by at most one and a half of its last places: up to one for the rounding of the factor, and
half of one for its own. It decides the rounding to a half type unless it lies that close to the middle between two
values of that type. Those elements (one in thirteen thousand of bfloat16, about one in a thousand of float16) are
computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wnconvert import rows
from wnconvert.rounding import once

_LARGE = 2.0**40
"""Between this and its reciprocal, factors are normal in float32, and so are their products with values of float16."""

_OFF = 2
"""Last places that a product in float32 may be off."""

_RUN = 128
"""Elements looked at as one."""

_EPS = torch.finfo(torch.float32).eps
_LEAST = torch.iinfo(torch.int32).min

SPARE = 3 * _RUN
"""Elements of memory beside those that a part needs."""


def multiply(x: Tensor, factor: Tensor, divisor: Tensor, out: Tensor, *, kept: int, scratch: Tensor) -> bool:
    """Write `x * factor / divisor`, computed in float64 and rounded once, into `out`, if float32 decides most of it.

    Args:
        x: float16 or bfloat16, finite, its kept axes first.
        factor: float64, finite, one per row as one axis.
        divisor: the same, above zero.
        out: of the shape and dtype of `x`, or `x` itself.
        kept: number of kept axes.
        scratch: float64 memory of two elements for each of `x`, and `SPARE` more. Overwritten.

    Returns:
        Whether it is done. Else `out` is as it was.
    """
    ratio, size = factor / divisor, x.numel()
    if not _within_range(ratio.abs()):
        return False
    whole = -(-size // _RUN) * _RUN
    single = scratch.view(torch.float32)
    flat, products, rest = single[:whole], single[whole : 2 * whole], single[2 * whole :]
    products[size:] = 0
    shaped, values = rows.workspace(flat, x, kept)
    result, by_row = rows.workspace(products, x, kept)
    shaped.copy_(x)
    torch.mul(values, ratio.float().unsqueeze(1), out=by_row)
    at = (_near_middles if x.dtype == torch.bfloat16 else _undecided)(products, rest)
    if at.numel() > size // 16:
        return False
    if at.numel():
        row = at // values.shape[1] if values.is_contiguous() else at % values.shape[0]
        products[at] = once(flat[at].double() * factor[row] / divisor[row], x.dtype).float()
    out.copy_(result)
    return True


def _within_range(size: Tensor) -> bool:
    least, most = (float(bound) for bound in size.aminmax())
    if least == 0:
        least = float(size.where(size != 0, most).amin())
    return least > 1 / _LARGE and most < _LARGE


def _near_middles(products: Tensor, memory: Tensor) -> Tensor:
    """The numbers of the products that may be rounded to the wrong value of bfloat16.

    That is the upper half of a float32, also where it is subnormal. So the lower half tells: it is near 2**15.
    """
    lower = memory[: products.numel()].view(torch.int32)
    # Moved up, so that what is near comes right after the least integer.
    moved = torch.tensor(_OFF << 16, dtype=torch.int32, device=products.device)
    torch.add(moved, products.view(torch.int32), alpha=1 << 16, out=lower)
    limit = _LEAST + (2 * _OFF << 16)
    at = _expanded(lower.view(-1, _RUN).amin(1) <= limit)
    return at[lower[at] <= limit]


def _undecided(products: Tensor, memory: Tensor) -> Tensor:
    """The numbers of the products that come to different values of float16 if they are a little smaller or larger.

    Rounding does not change the order of numbers, so the others come to what the exact product comes to.
    """
    size = products.numel()
    scaled, bounds = memory[:size], memory[size : 2 * size].view(torch.float16).view(2, size)
    for bound, by in zip(bounds, (1 + _OFF * _EPS, 1 - _OFF * _EPS), strict=True):
        bound.copy_(torch.mul(products, by, out=scaled))
    # Of one sign, bits as integers are in the order of the sizes.
    upper, lower = bounds.view(torch.int16)
    differ = upper.sub_(lower)
    at = _expanded(differ.view(-1, _RUN).amax(1) > 0)
    return at[differ[at] > 0]


def _expanded(runs: Tensor) -> Tensor:
    """The numbers of all elements of some runs."""
    return (runs.nonzero() * _RUN + torch.arange(_RUN, device=runs.device)).flatten()
