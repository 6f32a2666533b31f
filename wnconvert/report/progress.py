"""A progress bar on standard error, for a person who waits longer than a second."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sized
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from wnconvert.report import text

_Item = TypeVar("_Item")

PATIENCE = 1.0
"""Seconds before anything is drawn."""


class Bar:
    """A `watch.Watcher` and a context manager. Draws only once `PATIENCE` is over, and leaves nothing behind."""

    def __init__(self, console: Console, patience: float = PATIENCE) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=None, count="")
        # A long step may not report anything for minutes, so the bar starts by the clock.
        self._timer = threading.Timer(patience, self._progress.start)
        self._timer.daemon = True

    def __enter__(self) -> Bar:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._timer.join()
        self._progress.stop()

    def stage(self, label: str) -> None:
        """Name what is being done; its length is not known."""
        self._progress.reset(self._task, description=label, total=None, count="")

    def each(self, items: Iterable[_Item]) -> Iterable[_Item]:
        """Count the items of the present stage."""
        total = len(items) if isinstance(items, Sized) else None
        self._progress.update(self._task, total=total)
        for done, item in enumerate(items):
            self._progress.update(self._task, completed=done, count=f"{done} of {total}" if total else str(done))
            yield item

    def bytes(self, done: int, total: int) -> None:
        """Show how many bytes of the present stage are done."""
        self._progress.update(self._task, total=total, completed=done, count=f"{text.size(done)} of {text.size(total)}")
