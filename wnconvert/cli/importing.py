"""Importing the library takes a second or two, in which nothing becomes garbage and no signal gets lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from wnconvert.garbage import lasting

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


@contextmanager
def importing() -> Iterator[None]:
    """Import in here what is large."""
    with _held(), lasting():
        yield


@contextmanager
def _held() -> Iterator[None]:
    """Let signals wait: of what a handler raises within an import, some libraries make a warning, or nothing."""
    waiting: list[int] = []
    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    # Not in the main thread, whoever called us there handles signals. What is ignored stays so.
    mine = threading.current_thread() is threading.main_thread()
    before = {number: handler for number in numbers if mine and callable(handler := signal.getsignal(number))}
    for number in before:
        signal.signal(number, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])
