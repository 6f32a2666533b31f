"""A folder of `.bin` shards of torch.save with an index, as transformers wrote it before safetensors."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from wnconvert.carriers.shared_storage import SharedStorageCarrier
from wnconvert.errors import InputError
from wnconvert.files import index as indices
from wnconvert.files import parts, torch_file, torch_save, tree
from wnconvert.files.finished import Written, described, mark_of, mark_of_inputs
from wnconvert.files.magnitudes import statistics
from wnconvert.files.parts import Part
from wnconvert.files.torch_map import TorchMap
from wnconvert.files.torch_sharded import SUFFIX
from wnconvert.ranks import ALONE, Ranks
from wnconvert.walk.arch import walker_for
from wnconvert.watch import SILENT, Watcher

if TYPE_CHECKING:
    from wnconvert.files import Document, ReadOptions
    from wnconvert.report.model import MagnitudeStatistics, OutputCheck


def read(path: Path, options: ReadOptions) -> TorchShardedDocument:
    """Open a folder. Only the index and the descriptions of the tensors are read now.

    Raises:
        InputError: the index or a shard is damaged or missing, or they disagree.
    """
    index_path = indices.find(path, SUFFIX)
    index = indices.parse(index_path)
    shards = {
        name: _Shard(indices.shard(index_path, name), options) for name in dict.fromkeys(index["weight_map"].values())
    }
    indices.check_agreement(index_path, index["weight_map"], {name: shard.names() for name, shard in shards.items()})
    return TorchShardedDocument(index_path, index, shards, options)


class _Shard:
    """One file: a flat dict of tensors."""

    def __init__(self, path: Path, options: ReadOptions) -> None:
        self.opened = torch_file.open_file(path, options)
        self.root = self.opened.root
        if not isinstance(self.root, dict):
            raise InputError(f"{path}: holds {type(self.root).__name__}, not the dict of tensors that a shard is")
        self.tree = tree.explore(self.root, source=self.opened)
        nested = next((entry.name for entry in self.tree.entries if entry.prefix), None)
        if nested is not None or self.tree.kept or self.tree.modules:
            raise InputError(f"{path}: is no shard: it nests other dicts or holds more than tensors")

    def names(self) -> list[str]:
        return [entry.name for entry in self.tree.entries]


class TorchShardedDocument:
    """One open folder. See `Document`."""

    format = "torch-sharded"

    def __init__(
        self, index_path: Path, index: dict[str, Any], shards: Mapping[str, _Shard], options: ReadOptions
    ) -> None:
        self._folder = index_path.parent
        self._index_name = index_path.name
        self._index = index
        self._shards = shards
        self._shard_of_home: dict[Hashable, str] = {
            home: name for name, shard in shards.items() for home in shard.tree.holders
        }
        entries = [entry for shard in shards.values() for entry in shard.tree.entries]
        self.carrier = SharedStorageCarrier(entries, walker=walker_for(options.arch, self._folder), streamed=True)
        counts = [len(shard.tree.entries) for shard in shards.values()]
        self._portions = dict(zip(shards, self.carrier.portions(counts), strict=True))
        self.notes: list[str] = []
        self._watcher = SILENT
        self._crew = ALONE

    def magnitudes(self) -> Mapping[str, MagnitudeStatistics]:
        """See `Document.magnitudes`."""
        found = {}
        for name, entry in self.carrier.magnitudes().items():
            described = statistics(entry.load().detach().double().numpy())
            if described is not None:
                found[name] = described
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its key."""
        return {entry.name: entry.load().clone() for entry in self.carrier.entries()}

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
        inputs = mark_of_inputs(self._folder / name for name in (self._index_name, *self._shards))
        todo = {
            shard: Part(
                target / shard,
                (self._folder / shard).stat().st_size,
                functools.partial(self._mark, shard, inputs),
                functools.partial(self._write, target / shard, shard),
            )
            for shard in self._shards
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
        held = self._shards[shard]
        maps = [held.opened] if isinstance(held.opened, TorchMap) else []
        job = torch_save.Job({path: held.root}, held.tree, self._portions[shard], maps)
        return Written(torch_save.save(job, self._watcher))

    def _finish(self, target: Path) -> None:
        indices.copy_others(self._folder, target, {*self._shards, self._index_name})
        indices.write(target / self._index_name, self._new_index())

    def _new_index(self) -> dict[str, Any]:
        names = (entry.name for shard in self._shards.values() for entry in shard.tree.entries)
        slots = dict(zip(names, self.carrier.slots(), strict=True))
        return indices.rewritten(self._index, slots, lambda entry: self._shard_of_home[entry.home], tree.stored_size)
