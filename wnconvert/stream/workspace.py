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
                some = target[first : first + _IN_PARTS]
                for part, places in raw.shares(start + first, some.nbytes):
                    self._fill(some, part, places)
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
        """Write what a part has of the bytes of a tensor from `start` on, by one call: its rows may be short."""
        found = list(to.box.stretches(start // size, (start + data.nbytes) // size))
        if found:
            part = b"".join(data[at * size - start : (at + count) * size - start] for at, _, count in found)
            self.files.write(to.place.path, to.place.start + found[0][1] * size, memoryview(part))

    def copy(self, source: Raw, to: Place) -> None:
        """Copy bytes from file to file."""
        self.files.copy(source, to.path, to.start, memory_of(self.buffer("copy", min(COPY, source.size))))

    def _fill(self, target: memoryview, part: Raw, places: list[slice]) -> None:
        """Read a stretch of a file into places of `target`, by one call: rows of a part may be short."""
        if len(places) == 1:
            self.files.read(part.path, part.start, target[places[0]])
            return
        data = memory_of(self.buffer("part", part.size))
        self.files.read(part.path, part.start, data)
        for place in places:
            size = place.stop - place.start
            target[place], data = data[:size], data[size:]


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
