"""What folders of shards have in common, whatever the format of a shard. Nothing here imports torch."""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wnconvert.carriers.state_dict import StateDictCarrier
from wnconvert.files import index as indices
from wnconvert.files import parts
from wnconvert.files.finished import Written, described, mark_of, mark_of_inputs
from wnconvert.files.parts import Part
from wnconvert.ranks import ALONE, Ranks
from wnconvert.watch import SILENT, Watcher

if TYPE_CHECKING:
    from wnconvert.files import Document
    from wnconvert.report.model import OutputCheck


class ShardsDocument(abc.ABC):
    """An open folder with an index. See `Document`, `Shared` and `Watched`.

    Args:
        index_path: the index.
        index: what it holds.
        carrier: all tensors, in the order of the shards.
        counts: the number of tensors of each shard by its name.
    """

    def __init__(
        self, index_path: Path, index: dict[str, Any], carrier: StateDictCarrier, counts: Mapping[str, int]
    ) -> None:
        self.carrier = carrier
        self.notes: list[str] = []
        self._folder = index_path.parent
        self._index_name = index_path.name
        self._index = index
        self._portions = dict(zip(counts, carrier.portions(list(counts.values())), strict=True))
        self._watcher: Watcher = SILENT
        self._crew = ALONE

    def join(self, crew: Ranks) -> None:
        """See `Shared.join`."""
        self._crew = crew

    def watch(self, watcher: Watcher) -> None:
        """See `Watched.watch`."""
        self._watcher = watcher

    def save(self, folder: Path, name: str) -> None:
        """See `Document.save`. Files beside the shards (configuration, tokenizer) are copied."""
        indices.require_outside(folder, self._folder)
        target = folder / name
        target.mkdir(exist_ok=True)
        inputs = mark_of_inputs(self._folder / name for name in (self._index_name, *self._portions))
        todo = {
            shard: Part(
                target / shard,
                (self._folder / shard).stat().st_size,
                functools.partial(self._mark, shard, inputs),
                functools.partial(self._write, target / shard, shard),
            )
            for shard in self._portions
        }
        for written in parts.write(folder, todo, self._crew).values():
            for weight, outcome in written.outcomes.items():
                self.carrier.settle(weight, outcome)
        self._crew.first(lambda: self._finish(target))

    def compare_outputs(self, other: Document) -> OutputCheck | None:  # noqa: ARG002
        """None: a checkpoint cannot be run."""
        return None

    @abc.abstractmethod
    def _write(self, path: Path, shard: str) -> Written:
        """Write one shard of the result."""

    @abc.abstractmethod
    def _new_index(self) -> dict[str, Any]:
        """The index of the result."""

    def _mark(self, shard: str, inputs: int) -> str:
        return mark_of(inputs, map(described, self._portions[shard].entries()))

    def _finish(self, target: Path) -> None:
        indices.copy_others(self._folder, target, {*self._portions, self._index_name})
        indices.write(target / self._index_name, self._new_index())
