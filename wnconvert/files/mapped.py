"""Tensors that are views of a mapped file, so that reading one costs nothing before its values are used."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_RESIDENT = 64 << 20
"""Bytes handed out before pages that were read are given back to the system."""


class MappedFile:
    """One file, mapped on first use. Nothing that is done to its tensors reaches the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        self._handed_out = 0

    def bytes(self, start: int, size: int) -> bytes:
        """Read a part of the file."""
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(size)

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], start: int, size: int) -> Tensor:
        """View a part of the file as a tensor."""
        import torch

        if size == 0:
            return torch.empty(shape, dtype=dtype)
        if start % dtype.itemsize:
            # Not every reader of a tensor can do with misaligned memory.
            return torch.frombuffer(bytearray(self.bytes(start, size)), dtype=dtype).reshape(shape)
        if self._map is None:
            with self.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._handed_out += size
        if self._handed_out > _RESIDENT:
            self.release()
        return torch.frombuffer(self._map, dtype=dtype, count=size // dtype.itemsize, offset=start).reshape(shape)

    def release(self) -> None:
        """Give the memory of everything read so far back to the system; whoever still looks at it reads it again."""
        self._handed_out = 0
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
