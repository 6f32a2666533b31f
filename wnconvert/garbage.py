"""Making many objects that stay, without looking for garbage among them meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unwatched() -> Iterator[None]:
    """Do not look for garbage meanwhile, which costs more the more objects there are."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def lasting() -> Iterator[None]:
    """The same for what stays as long as the process: importing torch makes a million objects.

    Not for what may be garbage later: nothing counts it, so it would be looked at too late.
    """
    with unwatched():
        try:
            yield
        finally:
            if not gc.get_freeze_count():
                # Both together only make everything old, so that the next look leaves it out.
                gc.freeze()
                gc.unfreeze()
