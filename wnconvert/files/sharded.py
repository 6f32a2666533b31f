"""A folder of `.safetensors` shards with an index, as transformers writes it. The result is again a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wnconvert.carriers.state_dict import StateDictCarrier
from wnconvert.files import index as indices
from wnconvert.files import safetensors, streamed
from wnconvert.files import safetensors_header as header
from wnconvert.files.mapped import MappedFile
from wnconvert.files.shards import ShardsDocument
from wnconvert.files.streamed import Output
from wnconvert.files.written import Written
from wnconvert.walk.arch import walker_for

if TYPE_CHECKING:
    from torch import Tensor

    from wnconvert.files import ReadOptions
    from wnconvert.report.model import MagnitudeStatistics

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


class ShardedDocument(ShardsDocument):
    """One open folder. See `Document`."""

    format = "safetensors-sharded"

    def __init__(
        self, index_path: Path, index: dict[str, Any], shards: Mapping[str, header.Header], options: ReadOptions
    ) -> None:
        entries = (
            entry
            for name, parsed in shards.items()
            for entry in safetensors.entries(MappedFile(index_path.parent / name), parsed, home=name)
        )
        carrier = StateDictCarrier(entries, walker=walker_for(options.arch, index_path.parent), streamed=True)
        super().__init__(index_path, index, carrier, {name: len(parsed.tensors) for name, parsed in shards.items()})
        self._shards = shards
        self.notes += self._strays()

    def magnitudes(self) -> Mapping[str, MagnitudeStatistics]:
        """See `Document.magnitudes`."""
        return safetensors.magnitudes(self.carrier)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its key."""
        return {entry.name: entry.load() for entry in self.carrier.entries()}

    def _write(self, shard: str, path: Path) -> Written:
        portion = self._portions[shard]
        output = Output(path, self._shards[shard].metadata, portion.entries)
        return streamed.write(output, portion, self._watcher)

    def _new_index(self) -> dict[str, Any]:
        names = (tensor.name for parsed in self._shards.values() for tensor in parsed.tensors)
        slots = dict(zip(names, self.carrier.slots(), strict=True))
        return indices.rewritten(self._index, slots, lambda entry: str(entry.home), streamed.stored_size)

    def _strays(self) -> Iterator[str]:
        weights = (".bin", ".safetensors", ".pt", ".pth", ".onnx", ".msgpack", ".h5")
        for path in sorted(self._folder.iterdir()):
            if path.name.endswith(weights) and path.name not in self._shards:
                yield f"{path.name} is no shard of this index and is copied as it is"
