"""Making many objects that stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unwatched() -> Iterator[None]:
    """Do not look for garbage meanwhile: importing torch makes a million objects that stay, and takes less time so."""
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
