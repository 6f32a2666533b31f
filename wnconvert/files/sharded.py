"""A folder of `.safetensors` shards with an index, as transformers writes it. The result is again a folder."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wnconvert.carriers.state_dict import StateDictCarrier
from wnconvert.files import index as indices
from wnconvert.files import parts, safetensors, streamed
from wnconvert.files import safetensors_header as header
from wnconvert.files.entries import Entry
from wnconvert.files.finished import Written, described, mark_of, mark_of_inputs
from wnconvert.files.mapped import MappedFile
from wnconvert.files.parts import Part
from wnconvert.files.streamed import Output
from wnconvert.ranks import ALONE, Ranks
from wnconvert.walk.arch import walker_for
from wnconvert.watch import SILENT, Watcher

if TYPE_CHECKING:
    from torch import Tensor

    from wnconvert.files import Document, ReadOptions
    from wnconvert.report.model import MagnitudeStatistics, OutputCheck

_SUFFIX = ".safetensors.index.json"


def recognise(path: Path) -> bool:
    """Whether this is an index of shards, or a folder that holds one."""
    return indices.recognise(path, _SUFFIX)


def read(path: Path, options: ReadOptions) -> ShardedDocument:
    """Open a folder. Only the index and the headers of its shards are read now.

    Raises:
        InputError: the index or a shard is damaged or missing, or they disagree.
    """
    index_path = indices.find(path, _SUFFIX)
    index = indices.parse(index_path)
    shards = {
        name: header.read(indices.shard(index_path, name)) for name in dict.fromkeys(index["weight_map"].values())
    }
    held_by = {name: [tensor.name for tensor in parsed.tensors] for name, parsed in shards.items()}
    indices.check_agreement(index_path, index["weight_map"], held_by)
    return ShardedDocument(index_path, index, shards, options)


class ShardedDocument:
    """One open folder. See `Document`."""

    format = "safetensors-sharded"

    def __init__(
        self, index_path: Path, index: dict[str, Any], shards: Mapping[str, header.Header], options: ReadOptions
    ) -> None:
        self._folder = index_path.parent
        self._index_name = index_path.name
        self._index = index
        self._shards = shards
        self._mapped = {name: MappedFile(self._folder / name) for name in shards}
        self.carrier = StateDictCarrier(self._entries(), walker=walker_for(options.arch, self._folder), streamed=True)
        self.notes = list(self._notes())
        self._watcher = SILENT
        self._crew = ALONE
        self._portions = dict(
            zip(shards, self.carrier.portions([len(s.tensors) for s in shards.values()]), strict=True)
        )

    def join(self, crew: Ranks) -> None:
        """See `Shared.join`."""
        self._crew = crew

    def watch(self, watcher: Watcher) -> None:
        """See `Watched.watch`."""
        self._watcher = watcher

    def magnitudes(self) -> Mapping[str, MagnitudeStatistics]:
        """See `Document.magnitudes`."""
        return safetensors.magnitudes(self.carrier)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its key."""
        return {entry.name: entry.load() for entry in self.carrier.entries()}

    def save(self, folder: Path, name: str) -> None:
        """See `Document.save`. Files beside the shards (configuration, tokenizer) are copied."""
        indices.require_outside(folder, self._folder)
        target = folder / name
        target.mkdir(exist_ok=True)
        inputs = mark_of_inputs(self._folder / name for name in (self._index_name, *self._shards))
        todo = {
            shard: Part(
                target / shard,
                sum(tensor.size for tensor in parsed.tensors),
                functools.partial(self._mark, shard, inputs),
                functools.partial(self._write, target / shard, shard),
            )
            for shard, parsed in self._shards.items()
        }
        for written in parts.write(folder, todo, self._crew).values():
            for weight, outcome in written.outcomes.items():
                self.carrier.settle(weight, outcome)
        self._crew.first(lambda: self._finish(target))

    def compare_outputs(self, other: Document) -> OutputCheck | None:  # noqa: ARG002
        """None: a checkpoint cannot be run."""
        return None

    def _mark(self, shard: str, inputs: int) -> str:
        return mark_of(inputs, map(described, self._portions[shard].entries()))

    def _write(self, path: Path, shard: str) -> Written:
        portion = self._portions[shard]
        output = Output(path, self._shards[shard].metadata, portion.entries)
        return Written(streamed.write(output, portion, self._watcher))

    def _finish(self, target: Path) -> None:
        indices.copy_others(self._folder, target, {*self._shards, self._index_name})
        indices.write(target / self._index_name, self._new_index())

    def _entries(self) -> Iterator[Entry]:
        for name, parsed in self._shards.items():
            yield from safetensors.entries(self._mapped[name], parsed, home=name)

    def _new_index(self) -> dict[str, Any]:
        names = (tensor.name for parsed in self._shards.values() for tensor in parsed.tensors)
        slots = dict(zip(names, self.carrier.slots(), strict=True))
        return indices.rewritten(self._index, slots, lambda entry: str(entry.home), streamed.stored_size)

    def _notes(self) -> Iterator[str]:
        weights = (".bin", ".safetensors", ".pt", ".pth", ".onnx", ".msgpack", ".h5")
        for path in sorted(self._folder.iterdir()):
            if path.name.endswith(weights) and path.name not in self._shards:
                yield f"{path.name} is no shard of this index and is copied as it is"
