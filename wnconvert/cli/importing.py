"""Importing what takes long."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unwatched() -> Iterator[None]:
    """Import without looking for garbage meanwhile: torch makes a million objects that stay, and is there sooner."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            # Both together only make everything old, so that the next look leaves it out.
            gc.freeze()
            gc.unfreeze()
        if enabled:
            gc.enable()
