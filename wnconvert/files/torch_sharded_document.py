"""A folder of `.bin` shards of torch.save with an index, as transformers wrote it before safetensors."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from wnconvert.carriers.shared_storage import SharedStorageCarrier
from wnconvert.errors import InputError
from wnconvert.files import index as indices
from wnconvert.files import torch_file, torch_save, tree
from wnconvert.files.magnitudes import of_tensors
from wnconvert.files.shards import ShardsDocument
from wnconvert.files.torch_map import TorchMap
from wnconvert.files.torch_sharded import SUFFIX
from wnconvert.files.written import Written
from wnconvert.walk.arch import walker_for

if TYPE_CHECKING:
    from wnconvert.files import ReadOptions
    from wnconvert.report.model import MagnitudeStatistics


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


class TorchShardedDocument(ShardsDocument):
    """One open folder. See `Document`."""

    format = "torch-sharded"

    def __init__(
        self, index_path: Path, index: dict[str, Any], shards: Mapping[str, _Shard], options: ReadOptions
    ) -> None:
        entries = [entry for shard in shards.values() for entry in shard.tree.entries]
        carrier = SharedStorageCarrier(entries, walker=walker_for(options.arch, index_path.parent), streamed=True)
        super().__init__(index_path, index, carrier, {name: len(shard.names()) for name, shard in shards.items()})
        self._shards = shards
        self._shard_of_home: dict[Hashable, str] = {
            home: name for name, shard in shards.items() for home in shard.tree.holders
        }

    def magnitudes(self) -> Mapping[str, MagnitudeStatistics]:
        """See `Document.magnitudes`."""
        return of_tensors((name, entry.load()) for name, entry in self.carrier.magnitudes().items())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its key."""
        return {entry.name: entry.load().clone() for entry in self.carrier.entries()}

    def _write(self, shard: str, path: Path) -> Written:
        held = self._shards[shard]
        maps = [held.opened] if isinstance(held.opened, TorchMap) else []
        job = torch_save.Job({path: held.root}, held.tree, self._portions[shard], maps)
        return torch_save.save(job, self._watcher)

    def _new_index(self) -> dict[str, Any]:
        names = (entry.name for shard in self._shards.values() for entry in shard.tree.entries)
        slots = dict(zip(names, self.carrier.slots(), strict=True))
        return indices.rewritten(self._index, slots, lambda entry: self._shard_of_home[entry.home], tree.stored_size)
