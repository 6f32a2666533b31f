"""Write a folder of torch.distributed.checkpoint: the same files as the input has, with the converted tensors in them.

The parts of tensors that did not change are copied as they are stored. Each converted one is cut as the tensor it comes
from, and written as that library's own writer does: by torch.save, and listed by `FileSystemWriter.finish`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from wnconvert import names
from wnconvert.files import torch_skeleton
from wnconvert.files.dcp_items import Items, Part, parts_like
from wnconvert.files.entries import Entry, Raw
from wnconvert.files.filling import Filling, Held, Outcomes
from wnconvert.files.stand_ins import StandIns
from wnconvert.sites import SCHEMES
from wnconvert.stream.plan import Half, Pair
from wnconvert.watch import Watcher


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """What is converted.

    Attributes:
        metadata: of the input.
        items: of the input.
        before: the tensors of its networks.
        dropped: names to leave out.
        paths: where each name is in the nested state dict.
    """

    metadata: Metadata
    items: Items
    before: Sequence[Entry]
    dropped: frozenset[str]
    paths: Mapping[str, tuple[Any, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class _Converted:
    """One part of a converted tensor, and what it is made of if that is stored."""

    entry: Entry
    part: Part
    made: Pair | Half | None

    def load(self) -> Tensor:
        return self.part.within(self.entry.load())


@dataclasses.dataclass(frozen=True, slots=True)
class _Record:
    """One item of the output.

    Attributes:
        index: what it is.
        file: where it goes.
        start: the position in the input's file that it comes after.
        source: the stored item of the input that it is, or the part of a converted tensor.
    """

    index: MetadataIndex
    file: str
    start: int
    source: Raw | _Converted


class _Writer(FileSystemWriter):
    """Lists items that are written already."""

    def __init__(self, folder: Path, origin: StorageMeta | None) -> None:
        super().__init__(folder)
        self._origin = origin

    def storage_meta(self) -> StorageMeta | None:
        """What the input says of itself: where the folder is while it is written is nobody's concern."""
        return self._origin


def save(target: Path, source: Input, slots: Sequence[Sequence[Entry]], watcher: Watcher) -> Outcomes:
    """Write the folder.

    Args:
        target: holds nothing of the checkpoint, or what an earlier attempt left.
        source: the input.
        slots: for each of its tensors, what stands there now.
        watcher: is told how far it is.

    Returns:
        See `Filling.run`. If a split failed, there is no description yet.
    """
    plan = _Plan(source, slots)
    filling, stand_ins = Filling(), StandIns([])
    results: list[WriteResult] = []
    by_file: dict[str, list[_Record]] = {}
    for record in plan.records:
        by_file.setdefault(record.file, []).append(record)
    for name, records in by_file.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w+b") as file:
            for record in sorted(records, key=lambda record: record.start):
                start = file.seek(0, os.SEEK_END)
                _write(file, path, record, filling, stand_ins)
                length = file.seek(0, os.SEEK_END) - start
                results.append(WriteResult(record.index, length, _StorageInfo(name, start, length)))
    outcomes = filling.run(watcher)
    if not any(isinstance(outcome, str) for outcome in outcomes.values()):
        _Writer(target, source.metadata.storage_meta).finish(plan.metadata(), [results])
    return outcomes


def _write(file: IO[bytes], path: Path, record: _Record, filling: Filling, stand_ins: StandIns) -> None:
    source = record.source
    if isinstance(source, Raw):
        start = file.tell()
        file.truncate(start + source.size)
        filling.copy(path, start, source)
        return
    stand_in = stand_ins.new(dataclasses.replace(source.entry, shape=source.part.sizes))
    content = source.made or Held(source.load, stand_in.stride())
    filling.add(path, torch_skeleton.write(file, stand_in), lambda _: content)


class _Plan:
    """Which items the output has, and their description."""

    def __init__(self, source: Input, slots: Sequence[Sequence[Entry]]) -> None:
        self._source = source
        self._slots = {entry.name: slot for entry, slot in zip(source.before, slots, strict=True)}
        self._original = {entry.load: entry.name for entry in source.before}
        self._before = {entry.name: entry for entry in source.before}
        self._described: dict[str, STORAGE_TYPES] = {}
        self._paths: dict[str, tuple[Any, ...]] = {}
        self.records = list(self._each())

    def metadata(self) -> Metadata:
        """The description of the output, all but where its items are."""
        old = self._source.metadata
        planned = old.planner_data
        if isinstance(planned, dict):
            planned = {name: planned.get(name, path) for name, path in self._paths.items()}
        return dataclasses.replace(old, state_dict_metadata=self._described, planner_data=planned)

    def _each(self) -> Iterator[_Record]:
        for name, described in self._source.metadata.state_dict_metadata.items():
            if name in self._source.dropped:
                continue
            if name not in self._slots:
                self._describe(name, described, self._source.paths[name])
                yield from self._stored(name, name)
                continue
            for entry in self._slots[name]:
                path = (*self._source.paths[name][:-1], entry.key)
                original = self._original.get(entry.load)
                if original is not None:
                    self._describe(entry.name, self._source.metadata.state_dict_metadata[original], path)
                    yield from self._stored(original, entry.name)
                else:
                    yield from self._converted(entry, path)

    def _describe(self, name: str, described: STORAGE_TYPES, path: tuple[Any, ...]) -> None:
        self._described[name] = described
        self._paths[name] = path

    def _stored(self, old: str, new: str) -> Iterator[_Record]:
        for index, info in self._source.items.infos(old):
            raw = Raw(self._source.items.folder / info.relative_path, info.offset, info.length)
            yield _Record(dataclasses.replace(index, fqn=new), info.relative_path, info.offset, raw)

    def _converted(self, entry: Entry, path: tuple[Any, ...]) -> Iterator[_Record]:
        template = self._template(entry)
        groups = parts_like(self._source.items.parts(template.name), entry.shape, template.shape)
        properties = self._source.items.described(template.name).properties
        chunks = [ChunkStorageMetadata(torch.Size(group[0].offsets), torch.Size(group[0].sizes)) for group in groups]
        self._describe(entry.name, TensorStorageMetadata(properties, torch.Size(entry.shape), chunks), path)
        halves = self._halves(entry.name)
        for i, (part, *_) in enumerate(groups):
            made = self._source.items.pair(entry.name, *halves, part) if halves else entry.made
            converted = _Converted(entry, part, made)
            yield _Record(MetadataIndex(entry.name, part.offsets, i), part.file, part.start, converted)

    def _halves(self, name: str) -> tuple[Entry, Entry] | None:
        """The magnitude and direction that the input has for a plain weight."""
        for scheme in SCHEMES:
            g, v = (self._before.get(key) for key in names.spell(name, scheme))
            if g is not None and v is not None:
                return g, v
        return None

    def _template(self, entry: Entry) -> Entry:
        """The tensor of the input that a converted one comes from."""
        half = names.plain_name(entry.name)
        sources = [names.spell(entry.name, scheme)[1] for scheme in SCHEMES] + ([half[0]] if half else [])
        return next(self._before[name] for name in sources if name in self._before)
