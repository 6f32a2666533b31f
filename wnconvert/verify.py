"""Whether two networks are the same function: by their weights, bit for bit or in units in the last place."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from wnconvert.carriers import Carrier

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclasses.dataclass(slots=True)
class Comparison:
    """The weights of two networks, side by side.

    Attributes:
        compared: number of tensors with the same name, shape and dtype on both sides.
        missing: names on one side only.
        differing: `(name, number of differing elements, largest distance in ulp or None)`.
    """

    compared: int = 0
    missing: list[str] = dataclasses.field(default_factory=list)
    differing: list[tuple[str, int, int | None]] = dataclasses.field(default_factory=list)

    @property
    def identical(self) -> bool:
        """Same names, same bits."""
        return not self.missing and not self.differing

    def within(self, ulp: int) -> bool:
        """Same names, and every element at most `ulp` units in the last place away."""
        return not self.missing and all(far is not None and far <= ulp for _, _, far in self.differing)

    @property
    def first_difference(self) -> str:
        """One line on what differs first."""
        if self.missing:
            return f"{self.missing[0]} is on one side only ({len(self.missing)} such names)"
        if not self.differing:
            return "nothing differs"
        name, count, ulp = self.differing[0]
        far = "in shape or dtype" if ulp is None else f"in {count} values, by up to {ulp} ulp"
        return f"{name} differs {far} ({len(self.differing)} such tensors)"


def compare_weights(a: Carrier, b: Carrier) -> Comparison:
    """Compare every tensor of two networks, split weights multiplied back, one tensor in memory at a time."""
    left, right = a.effective(), b.effective()
    result = Comparison(missing=sorted(left.keys() ^ right.keys()))
    for name in left:
        if name not in right:
            continue
        x, y = left[name](), right[name]()
        if x.shape != y.shape or x.dtype != y.dtype:
            result.differing.append((name, 0, None))
            continue
        result.compared += 1
        count = differing_bits(x, y)
        if count:
            result.differing.append((name, count, ulp_distance(x, y)))
    return result


def differing_bits(a: Tensor, b: Tensor) -> int:
    """Number of elements of two tensors of one shape and dtype that differ in any bit (NaN equals the same NaN)."""
    return int((_as_bits(a) != _as_bits(b)).sum())


def ulp_distance(a: Tensor, b: Tensor) -> int | None:
    """The largest number of representable values between two elements, or None for tensors that are not floating."""
    if not a.is_floating_point() or a.element_size() < 2:
        return None
    return int((_ordered(a) - _ordered(b)).abs().max())


def _as_bits(t: Tensor) -> Tensor:
    t = t.detach().cpu().contiguous()
    if t.is_complex():
        t = torch.view_as_real(t).contiguous()
    return t if t.dtype == torch.bool else t.view(_BITS[t.element_size()])


def _ordered(t: Tensor) -> Tensor:
    """Integers in the order of the floats: -0.0 and 0.0 both become 0."""
    bits = _as_bits(t)
    low = torch.iinfo(bits.dtype).min
    return torch.where(bits < 0, low - bits.long(), bits.long())
