"""What folders of shards have in common, whatever the format of a shard. Nothing here imports torch."""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wnconvert.carriers.state_dict import StateDictCarrier
from wnconvert.files import index as indices
from wnconvert.files.finished import described
from wnconvert.files.folder import File, FolderDocument
from wnconvert.files.written import Written


class ShardsDocument(FolderDocument):
    """An open folder with an index.

    Args:
        index_path: the index.
        index: what it holds.
        carrier: all tensors, in the order of the shards.
        counts: the number of tensors of each shard by its name.
    """

    def __init__(
        self, index_path: Path, index: dict[str, Any], carrier: StateDictCarrier, counts: Mapping[str, int]
    ) -> None:
        super().__init__(index_path.parent, carrier)
        self._index_name = index_path.name
        self._index = index
        self._portions = dict(zip(counts, carrier.portions(list(counts.values())), strict=True))

    @abc.abstractmethod
    def _write(self, shard: str, path: Path) -> Written:
        """Write one shard of the result."""

    @abc.abstractmethod
    def _new_index(self) -> dict[str, Any]:
        """The index of the result."""

    def _own(self) -> Sequence[str]:
        return self._index_name, *self._portions

    def _files(self) -> dict[str, File]:
        return {
            shard: File(functools.partial(self._content, shard), functools.partial(self._write, shard))
            for shard in self._portions
        }

    def _describe(self, target: Path, written: Mapping[str, Written]) -> None:  # noqa: ARG002
        indices.write(target / self._index_name, self._new_index())

    def _content(self, shard: str) -> Iterator[object]:
        return map(described, self._portions[shard].entries())
