"""The memory of one worker: buffers that are used again for every piece, and the tensors seen in them."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from wnconvert import weightnorm
from wnconvert.files.raw import Inline, Raw, Scattered
from wnconvert.stream.fileio import Files
from wnconvert.stream.plan import Kept, PartPlace, Place, Stored, Target
from wnconvert.stream.shares import gather, scatter, share

COPY = 8 << 20
"""Bytes copied or compared at a time."""

_IN_PARTS = 1 << 20
"""Bytes of a tensor in parts at a time. Its rows may be so short that a list of them takes more than they do."""


class Workspace:
    """Reads pieces of stored tensors into buffers of its own, and writes them out again. For one thread.

    Attributes:
        files: what it reads and writes.
        scratch: for `weightnorm`.
    """

    def __init__(self, files: Files) -> None:
        self.files = files
        # Memory that was given back and taken again for every piece would be cleared by the kernel each time.
        self.scratch = _memory(weightnorm.SCRATCH * torch.float64.itemsize).view(torch.float64)
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, role: str, size: int) -> Tensor:
        """The first `size` bytes of the buffer for this role. What it held is gone."""
        held = self._buffers.get(role)
        if held is None or held.numel() < size:
            # The old one goes first, so that there are never both.
            self._buffers.pop(role, None)
            held = self._buffers[role] = _memory(size)
        return held[:size]

    def read(self, role: str, stored: Stored, first: int, shape: tuple[int, ...]) -> Tensor:
        """Elements of a stored tensor from number `first` on, in the buffer for this role."""
        dtype = torch_dtype(stored.dtype)
        data = self.read_bytes(role, stored.raw, first * dtype.itemsize, math.prod(shape) * dtype.itemsize)
        return data.view(dtype).view(shape)

    def read_bytes(self, role: str, raw: Raw | Inline | Scattered, start: int, size: int) -> Tensor:
        """Bytes of a stored tensor from `start` on, in the buffer for this role."""
        data = self.buffer(role, size)
        self.fill(memory_of(data), raw, start)
        return data

    def fill(self, target: memoryview, raw: Raw | Inline | Scattered, start: int = 0) -> None:
        """Read bytes of a stored tensor from `start` on, as many as there is room for."""
        if isinstance(raw, Inline):
            target[:] = raw.data[start : start + target.nbytes]
        elif isinstance(raw, Scattered):
            for first in range(0, target.nbytes, _IN_PARTS):
                self._fill(target[first : first + _IN_PARTS], raw, start + first)
        elif target.nbytes:
            self.files.read(raw.path, raw.start + start, target)

    def write(self, to: Target, first: int, values: Tensor) -> None:
        """Write contiguous values at element number `first` of the tensor that goes there."""
        size, data = values.element_size(), memory_of(values)
        if isinstance(to, Kept):
            to.data[first * size : first * size + data.nbytes] = data
        elif isinstance(to, Place):
            self.files.write(to.path, to.start + first * size, data)
        else:
            for begin in range(0, data.nbytes, _IN_PARTS):
                self._write_part(to, first * size + begin, data[begin : begin + _IN_PARTS], size)

    def _write_part(self, to: PartPlace, start: int, data: memoryview, size: int) -> None:
        """Write what a part has of the bytes of a tensor from `start` on, in elements of `size` bytes."""
        own = share(to.box, start // size, (start + data.nbytes) // size)
        if own is not None:
            self.files.write(to.place.path, to.place.start + own.first * size, gather(data, own.places, size))

    def copy(self, source: Raw, to: Place) -> None:
        """Copy bytes from file to file."""
        self.files.copy(source, to.path, to.start, memory_of(self.buffer("copy", min(COPY, source.size))))

    def _fill(self, target: memoryview, stored: Scattered, start: int) -> None:
        """Read bytes of a tensor in parts from `start` on."""
        size = stored.itemsize
        for box, raw in stored.parts:
            own = share(box, start // size, (start + target.nbytes) // size)
            if own is None:
                continue
            at = raw.start + own.first * size
            if own.length * size == target.nbytes:
                self.files.read(raw.path, at, target)
                continue
            data = memory_of(self.buffer("part", own.length * size))
            self.files.read(raw.path, at, data)
            scatter(data, target, own.places, size)


def _memory(size: int) -> Tensor:
    """Memory outside the heap. There, every thread has a part of its own, and large holes stay when it has ended."""
    return torch.frombuffer(mmap.mmap(-1, max(size, 1)), dtype=torch.uint8)


def memory_of(values: Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    return values.reshape(-1).view(torch.uint8).numpy().data


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of this name, as in `float32`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype
