"""CRC-32 of parts of the outputs, taken while they are written, in whatever order that happens."""

from __future__ import annotations

import threading
from pathlib import Path

from wnconvert import crc
from wnconvert.stream.fileio import Files

_SMALLEST = 1 << 16
"""Bytes of a write that is noted. What is written in smaller ones is read again: that costs less than keeping them."""

_PIECE = 1 << 20


class ChecksummedFiles(Files):
    """Open files that remember the checksum of what is written."""

    def __init__(self) -> None:
        super().__init__()
        self._written: dict[Path, dict[int, tuple[int, int]]] = {}
        self._noting = threading.Lock()

    def write(self, path: Path, start: int, data: memoryview) -> None:
        """See `Files.write`."""
        super().write(path, start, data)
        if data.nbytes >= _SMALLEST:
            # While the data still is in the cache of the processor.
            checksum = crc.crc32(data)
            with self._noting:
                self._written.setdefault(path, {})[start] = (data.nbytes, checksum)

    def checksum(self, path: Path, start: int, size: int, *, again: bool) -> int:
        """The CRC-32 of bytes of an output that are all written. `again` if some of them more than once."""
        written, found, at = {} if again else self._written.get(path, {}), 0, start
        while at < start + size and at in written:
            length, checksum = written[at]
            found = crc.combine(found, checksum, length)
            at += length
        return found if at == start + size else _read(path, start, size)


def _read(path: Path, start: int, size: int) -> int:
    checksum = 0
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        buffer = memoryview(bytearray(min(size, _PIECE)))
        while size and (count := file.readinto(buffer[: min(size, _PIECE)])):
            checksum = crc.crc32(buffer[:count], checksum)
            size -= count
    return checksum
