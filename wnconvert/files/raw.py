"""A part of a file, or what stands for one. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path


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
