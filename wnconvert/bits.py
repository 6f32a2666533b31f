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
