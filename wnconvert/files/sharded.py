"""A folder of `.safetensors` shards with an index, as transformers writes it. The result is again a folder."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wnconvert.carriers.state_dict import StateDictCarrier
from wnconvert.errors import InputError, UsageError
from wnconvert.files import safetensors, streamed
from wnconvert.files import safetensors_header as header
from wnconvert.files.entries import Entry
from wnconvert.files.finished import Finished, mark_of
from wnconvert.files.mapped import MappedFile
from wnconvert.files.streamed import Output
from wnconvert.ranks import ALONE, Ranks, shares
from wnconvert.sites import RowCounts
from wnconvert.walk.arch import walker_for
from wnconvert.watch import SILENT, Watcher

if TYPE_CHECKING:
    from torch import Tensor

    from wnconvert.files import Document, ReadOptions
    from wnconvert.report.model import MagnitudeStatistics, OutputCheck

_SUFFIX = ".safetensors.index.json"


def recognise(path: Path) -> bool:
    """Whether this is an index of shards, or a folder that holds one."""
    return path.name.endswith(_SUFFIX) if path.is_file() else path.is_dir() and bool(_indices(path))


def read(path: Path, options: ReadOptions) -> ShardedDocument:
    """Open a folder. Only the index and the headers of its shards are read now.

    Raises:
        InputError: the index or a shard is damaged or missing, or they disagree.
    """
    index_path = _index_of(path)
    index = _parse(index_path)
    shards = {name: header.read(_shard(index_path, name)) for name in dict.fromkeys(index["weight_map"].values())}
    _check_agreement(index_path, index["weight_map"], shards)
    return ShardedDocument(index_path, index, shards, options)


class ShardedDocument:
    """One open folder. See `Document`."""

    format = "safetensors-sharded"
    resumable = True

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
        self._ranks = ALONE
        # The carrier keeps its slots in the order of the entries, shard after shard.
        ends = list(itertools.accumulate(len(parsed.tensors) for parsed in shards.values()))
        self._ranges = dict(zip(shards, zip([0, *ends], ends, strict=False), strict=True))

    def join(self, ranks: Ranks) -> None:
        """See `Shared.join`."""
        self._ranks = ranks

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
        if folder.resolve().is_relative_to(self._folder.resolve()):
            raise UsageError(f"{self._folder}: the output would lie inside the input; choose another -o")
        target = folder / name
        target.mkdir(exist_ok=True)
        for outcomes in self._ranks.together(lambda: self._write_share(folder, target)):
            for weight, outcome in outcomes.items():
                self.carrier.settle(weight, outcome)
        if self._ranks.rank:
            return
        self._copy_others(target)
        text = json.dumps(self._new_index(), indent=2, ensure_ascii=False) + "\n"
        (target / self._index_name).write_text(text, encoding="utf-8")

    def compare_outputs(self, other: Document) -> OutputCheck | None:  # noqa: ARG002
        """None: a checkpoint cannot be run."""
        return None

    def _write_share(self, folder: Path, target: Path) -> dict[str, RowCounts | str]:
        """Write the shards that fall to this process, and say what the splits in them came to."""
        sizes = {shard: sum(tensor.size for tensor in parsed.tensors) for shard, parsed in self._shards.items()}
        finished = Finished(folder)
        outcomes: dict[str, RowCounts | str] = {}
        for shard in shares(sizes, self._ranks.count)[self._ranks.rank]:
            outcomes |= self._write_shard(target, shard, finished)
        return outcomes

    def _write_shard(self, target: Path, shard: str, finished: Finished) -> Mapping[str, RowCounts | str]:
        path = target / shard
        path.parent.mkdir(parents=True, exist_ok=True)
        output = Output(path, self._shards[shard].metadata, functools.partial(self._entries_of, shard))
        mark = mark_of(streamed.plan(output)[1])
        outcomes = finished.find(path, shard, mark)
        if outcomes is None:
            outcomes = streamed.write(output, self.carrier, self._watcher)
            finished.add(path, shard, mark, outcomes)
        return outcomes

    def _entries_of(self, shard: str) -> list[Entry]:
        start, stop = self._ranges[shard]
        return [entry for slot in self.carrier.slots()[start:stop] for entry in slot]

    def _entries(self) -> Iterator[Entry]:
        for name, parsed in self._shards.items():
            yield from safetensors.entries(self._mapped[name], parsed, home=name)

    def _new_index(self) -> dict[str, Any]:
        """The index with the names and totals of what is there now, in the order in which it listed them."""
        slots = dict(zip(self._names(), self.carrier.slots(), strict=True))
        listed = [entry for key in self._index["weight_map"] for entry in slots[key]]
        totals = {
            "total_size": sum(streamed.stored_size(entry) for entry in listed),
            "total_parameters": sum(math.prod(entry.shape) for entry in listed),
        }
        metadata = self._index.get("metadata")
        new = dict(self._index)
        if isinstance(metadata, dict):
            new["metadata"] = metadata | {key: value for key, value in totals.items() if key in metadata}
        new["weight_map"] = {entry.name: entry.home for entry in listed}
        return new

    def _names(self) -> Iterator[str]:
        return (tensor.name for parsed in self._shards.values() for tensor in parsed.tensors)

    def _copy_others(self, target: Path) -> None:
        ours = {self._folder / name for name in (*self._shards, self._index_name)}
        for path in _files_below(self._folder):
            if path not in ours:
                copy = target / path.relative_to(self._folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)

    def _notes(self) -> Iterator[str]:
        weights = (".bin", ".safetensors", ".pt", ".pth", ".onnx", ".msgpack", ".h5")
        for path in sorted(self._folder.iterdir()):
            if path.name.endswith(weights) and path.name not in self._shards:
                yield f"{path.name} is no shard of this index and is copied as it is"


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file of a folder, links followed."""
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        yield from (path for name in sorted(names) if (path := Path(root, name)).is_file())


def _indices(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{_SUFFIX}"))


def _index_of(path: Path) -> Path:
    if path.is_file():
        return path
    found = _indices(path)
    if len(found) > 1:
        raise InputError(f"{path}: holds {len(found)} indices; name one of them, such as {found[0].name}")
    return found[0]


def _parse(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged: no JSON: {str(error).splitlines()[0]}") from error
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(shard, str) for shard in table.values()):
        raise InputError(f"{path}: damaged: it has no weight_map from names to files")
    return dict(index)


def _shard(index: Path, name: str) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{index}: names the shard {name!r}, which is outside its folder")
    path = index.parent / name
    if not path.is_file():
        raise InputError(f"{path}: missing, but {index.name} names it")
    return path


def _check_agreement(index: Path, weight_map: Mapping[str, str], shards: Mapping[str, header.Header]) -> None:
    held: dict[str, str] = {}
    for shard, parsed in shards.items():
        for tensor in parsed.tensors:
            if tensor.name in held:
                raise InputError(f"{index}: {tensor.name!r} is in both {held[tensor.name]} and {shard}")
            held[tensor.name] = shard
    for name, shard in weight_map.items():
        if held.get(name) != shard:
            raise InputError(f"{index}: says that {name!r} is in {shard}, but it is not")
    extra = next((name for name in held if name not in weight_map), None)
    if extra is not None:
        raise InputError(f"{index}: {extra!r} is in {held[extra]}, but the index does not list it")
