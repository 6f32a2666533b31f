"""Which tensors read the same memory without being the same view of it: transposed, sliced or overlapping."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


def overlaps(tensors: Mapping[str, Tensor], buffers: Collection[str] = ()) -> dict[str, str]:
    """Find tensors that share elements in different layouts, so that no pair in the place of one can serve the other.

    Args:
        tensors: by name. The same view under two names is a tie, and no overlap.
        buffers: names of tensors that stay as they are; even the same view of a parameter under such a name overlaps.

    Returns:
        For the name of each tensor that shares elements with another one, the name of that.
    """
    views: dict[_View, list[str]] = {}
    for name, tensor in tensors.items():
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and tensor.numel():
            views.setdefault(_View.of(tensor, name in buffers), []).append(name)
    found: dict[str, str] = {}
    near: list[_View] = []
    for view in sorted(views, key=lambda view: (view.memory, view.start)):
        near = [other for other in near if other.memory == view.memory and other.stop > view.start]
        for other in near:
            if _share(view, other):
                found |= dict.fromkeys(views[view], views[other][0]) | dict.fromkeys(views[other], views[view][0])
        near.append(view)
    return found


class _View(NamedTuple):
    """A tensor as the bytes that it reads."""

    memory: str
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    size: int
    buffer: bool

    @classmethod
    def of(cls, tensor: Tensor, buffer: bool) -> _View:
        size, memory, start = tensor.element_size(), str(tensor.device), int(tensor.data_ptr())
        if tensor.is_meta:
            # No address, but a storage that others may view too.
            memory, start = f"meta {tensor.untyped_storage()._cdata}", int(tensor.storage_offset()) * size
        return cls(memory, start, tuple(tensor.shape), tensor.stride(), size, buffer)

    @property
    def stop(self) -> int:
        return self.start + self.size * (
            1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        )

    @property
    def dense(self) -> bool:
        """Whether it reads every byte between its first and its last."""
        return self.stop - self.start == self.size * math.prod(self.shape)

    def marked(self, marks: Tensor, start: int, unit: int) -> Tensor:
        """The elements of `marks`, one for every `unit` bytes from `start` on, that stand for what it reads."""
        width = self.size // unit
        steps = [step * width for step in self.stride]
        return marks.as_strided((*self.shape, width), (*steps, 1), (self.start - start) // unit)


def _share(a: _View, b: _View) -> bool:
    """Whether two views whose ranges meet have a byte in common: slices of columns may interleave without."""
    if a.dense and b.dense:
        return True
    start, stop = min(a.start, b.start), max(a.stop, b.stop)
    unit = math.gcd(a.size, b.size, a.start - b.start)
    marks = torch.zeros((stop - start) // unit, dtype=torch.bool, device="cpu")
    a.marked(marks, start, unit).fill_(True)
    return bool(b.marked(marks, start, unit).any())
