"""A second row of the table of formats, which recognises nothing."""

from __future__ import annotations

from pathlib import Path


def recognise(path: Path) -> bool:
    return False
