"""A part of a file. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, slots=True)
class Raw:
    """The bytes of a tensor in a file, which can be copied without looking at them."""

    path: Path
    start: int
    size: int
