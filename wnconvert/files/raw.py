"""A part of a file, or what stands for one. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from wnconvert.files.box import Box


@dataclasses.dataclass(frozen=True, slots=True)
class Raw:
    """The bytes of a tensor in a file, which can be copied without looking at them."""

    path: Path
    start: int
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Inline:
    """The bytes of a small tensor that has no place of its own in a file."""

    data: bytes

    @property
    def size(self) -> int:
        """Number of bytes."""
        return len(self.data)


@dataclasses.dataclass(frozen=True, slots=True)
class Scattered:
    """The bytes of a tensor that is stored in parts.

    Attributes:
        parts: which elements each has, and where they are. Together they have every element once.
        itemsize: bytes of an element.
        size: number of bytes of the whole.
    """

    # The files and what describes them say it all: a list of many parts with each of them takes long to write.
    parts: tuple[tuple[Box, Raw], ...] = dataclasses.field(repr=False)
    itemsize: int
    size: int
