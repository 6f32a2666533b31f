"""A file as one read-only storage, whose parts cost nothing before their values are looked at."""

from __future__ import annotations

import dataclasses
import io
import mmap
import warnings
from pathlib import Path
from typing import IO

import torch

_RESIDENT = 64 << 20
"""Bytes looked at before pages that were read are given back to the system."""


class NotMappable(Exception):
    """The file is no plain archive of little-endian storages. Whoever reads it into memory can tell what it is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a file."""

    start: int
    size: int


class FileMap:
    """One file. Writing to its storages would crash."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._looked_at = 0
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.size = len(self._map)
        with warnings.catch_warnings():
            # That it cannot be written to.
            warnings.simplefilter("ignore")
            self._whole = torch.frombuffer(self._map, dtype=torch.uint8).untyped_storage()
        self._base = self._whole.data_ptr()

    def slice(self, place: Place) -> torch.UntypedStorage:
        """A part of the file.

        Raises:
            NotMappable: it is not all there.
        """
        if place.start < 0 or place.start + place.size > self.size:
            raise NotMappable("a storage lies outside the file")
        part: torch.UntypedStorage = self._whole[place.start : place.start + place.size]
        return part

    def offset(self, address: int) -> int | None:
        """Where in the file an address of memory lies, or None if it is elsewhere."""
        offset = address - self._base
        return offset if 0 <= offset < self.size else None

    def look(self, size: int) -> None:
        """Note that so many bytes are about to be read, and give back what was read before if it is much."""
        self._looked_at += size
        if self._looked_at > _RESIDENT:
            self._looked_at = size
            self.release()

    def release(self) -> None:
        """Give the memory of everything that was looked at back to the system."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class Window(io.RawIOBase):
    """A part of an open file as a file of its own, to read."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("before the start of the file")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
