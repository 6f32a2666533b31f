"""A folder of `.bin` shards of torch.save with an index, as transformers wrote it before safetensors."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from wnconvert.carriers.shared_storage import SharedStorageCarrier
from wnconvert.errors import InputError, UsageError
from wnconvert.files import index as indices
from wnconvert.files import torch_file, torch_save, tree
from wnconvert.files.magnitudes import statistics
from wnconvert.files.torch_map import TorchMap
from wnconvert.files.torch_sharded import SUFFIX
from wnconvert.files.tree import Tree
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
        self._tree = _together(shard.tree for shard in shards.values())
        self._shard_of_home: dict[Hashable, str] = {
            home: name for name, shard in shards.items() for home in shard.tree.holders
        }
        self.carrier = SharedStorageCarrier(
            self._tree.entries, walker=walker_for(options.arch, self._folder), streamed=True
        )
        self.notes: list[str] = []
        self._watcher = SILENT

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

    def watch(self, watcher: Watcher) -> None:
        """See `Watched.watch`."""
        self._watcher = watcher

    def save(self, folder: Path, name: str) -> None:
        """See `Document.save`. Files beside the shards (configuration, tokenizer) are copied."""
        if folder.resolve().is_relative_to(self._folder.resolve()):
            raise UsageError(f"{self._folder}: the output would lie inside the input; choose another -o")
        target = folder / name
        target.mkdir()
        indices.copy_others(self._folder, target, {*self._shards, self._index_name})
        roots: dict[Path, object] = {}
        for shard_name, shard in self._shards.items():
            (target / shard_name).parent.mkdir(parents=True, exist_ok=True)
            roots[target / shard_name] = shard.root
        maps = [shard.opened for shard in self._shards.values() if isinstance(shard.opened, TorchMap)]
        torch_save.save(torch_save.Job(roots, self._tree, self.carrier, maps), self._watcher)
        text = json.dumps(self._new_index(), indent=2, ensure_ascii=False) + "\n"
        (target / self._index_name).write_text(text, encoding="utf-8")

    def compare_outputs(self, other: Document) -> OutputCheck | None:  # noqa: ARG002
        """None: a checkpoint cannot be run."""
        return None

    def _new_index(self) -> dict[str, Any]:
        slots = dict(zip((entry.name for entry in self._tree.entries), self.carrier.slots(), strict=True))
        return indices.rewritten(self._index, slots, lambda entry: self._shard_of_home[entry.home], tree.stored_size)


def _together(trees: Iterator[Tree]) -> Tree:
    """Several trees as one."""
    whole = Tree()
    for part in trees:
        whole.entries += part.entries
        whole.holders |= part.holders
    return whole
