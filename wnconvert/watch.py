"""How long work is followed from outside. The library is silent; the command line draws a progress bar."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

_Item = TypeVar("_Item")


class Watcher(Protocol):
    """Is told what is being done."""

    def stage(self, label: str) -> None:
        """From now on, `label` is being done."""

    def each(self, items: Iterable[_Item]) -> Iterable[_Item]:
        """Pass the items of the present stage through, seeing how far it is."""

    def bytes(self, done: int, total: int) -> None:
        """The present stage has gone through so many bytes."""


class _Silent:
    def stage(self, label: str) -> None:
        pass

    def each(self, items: Iterable[_Item]) -> Iterable[_Item]:
        return items

    def bytes(self, done: int, total: int) -> None:
        pass


SILENT: Watcher = _Silent()
