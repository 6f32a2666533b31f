"""What goes into the files of a torch.distributed.checkpoint folder: the same as the input has, but for what changed.

The parts of tensors that did not change are copied as they are stored. Each converted one is cut as the tensor it comes
from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from wnconvert import names
from wnconvert.files import finished
from wnconvert.files.dcp_items import Items, Part, parts_like
from wnconvert.files.entries import Entry, Raw
from wnconvert.files.filling import PartOf
from wnconvert.sites import SCHEMES
from wnconvert.stream.plan import Half, Pair


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
class Converted:
    """One part of a converted tensor, and what it is made of if that is stored."""

    entry: Entry
    part: Part
    made: Pair | Half | PartOf | None

    def load(self) -> Tensor:
        """Its values."""
        if self.part.empty:
            return torch.empty(self.part.sizes, dtype=getattr(torch, self.entry.dtype))
        return self.part.within(self.entry.load())


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
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
    source: Raw | Converted

    def described(self) -> tuple[object, ...]:
        """What it is made of, for `finished.mark_of`."""
        source = self.source
        content = source if isinstance(source, Raw) else (finished.described(source.entry), source.part, source.made)
        return self.index.fqn, self.index.offset, self.start, content


class Plan:
    """Which items the output has, and their description.

    Attributes:
        files: the items of each file by its name, in the order in which they are stored.
    """

    def __init__(self, source: Input, slots: Sequence[Sequence[Entry]]) -> None:
        self._source = source
        self._slots = {entry.name: slot for entry, slot in zip(source.before, slots, strict=True)}
        self._original = {entry.load: entry.name for entry in source.before}
        self._before = {entry.name: entry for entry in source.before}
        self._described: dict[str, STORAGE_TYPES] = {}
        self._paths: dict[str, tuple[Any, ...]] = {}
        self.files: dict[str, list[Record]] = {}
        for record in self._each():
            self.files.setdefault(record.file, []).append(record)
        for records in self.files.values():
            records.sort(key=lambda record: record.start)

    @property
    def origin(self) -> StorageMeta | None:
        """What the input says of itself."""
        return self._source.metadata.storage_meta

    def metadata(self) -> Metadata:
        """The description of the output, all but where its items are."""
        old = self._source.metadata
        planned = old.planner_data
        if isinstance(planned, dict):
            planned = {name: planned.get(name, path) for name, path in self._paths.items()}
        return dataclasses.replace(old, state_dict_metadata=self._described, planner_data=planned)

    def _each(self) -> Iterator[Record]:
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

    def _stored(self, old: str, new: str) -> Iterator[Record]:
        for index, info in self._source.items.infos(old):
            raw = Raw(self._source.items.folder / info.relative_path, info.offset, info.length)
            yield Record(dataclasses.replace(index, fqn=new), info.relative_path, info.offset, raw)

    def _converted(self, entry: Entry, path: tuple[Any, ...]) -> Iterator[Record]:
        template = self._template(entry)
        parts = parts_like(self._source.items.parts(template.name), entry.shape, template.shape)
        properties = self._source.items.described(template.name).properties
        chunks = [ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes)) for part in parts]
        self._describe(entry.name, TensorStorageMetadata(properties, torch.Size(entry.shape), chunks), path)
        halves = self._halves(entry.name)
        for i, part in enumerate(parts):
            converted = Converted(entry, part, None if part.empty else self._made(entry, part, halves))
            yield Record(MetadataIndex(entry.name, part.offsets, i), part.file, part.start, converted)

    def _made(self, entry: Entry, part: Part, halves: tuple[Entry, Entry] | None) -> Pair | Half | PartOf | None:
        pair = self._source.items.pair(entry.name, *halves, part) if halves else None
        if pair is not None or entry.made is None:
            return pair
        return entry.made if part.sizes == entry.shape else PartOf(entry.made, part.box(entry.shape))

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
        # What was folded and split again on one open file comes from another direction.
        found = [*names.sources(entry.name), *(names.sources(half[0]) if half else ())]
        return next(self._before[name] for name in found if name in self._before)
