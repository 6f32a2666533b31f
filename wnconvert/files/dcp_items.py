"""The stored items of a torch.distributed.checkpoint folder: each part of a tensor is an archive in a file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from wnconvert import names
from wnconvert.errors import InputError
from wnconvert.files import torch_map
from wnconvert.files.box import Box, overlap
from wnconvert.files.entries import Entry, Raw
from wnconvert.files.file_map import FileMap, NotMappable
from wnconvert.files.raw import Scattered
from wnconvert.stream.plan import Pair, Stored

_LARGE = 1 << 20
"""Bytes of a tensor that is not read as a whole."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One stored part of a tensor.

    Attributes:
        offsets: where in the tensor it begins.
        sizes: its shape.
        file: that holds it, by its name in the folder.
        start: of its item in that file.
        length: of its item.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int

    @property
    def empty(self) -> bool:
        """Whether it has no element: a process may have no part of a short axis."""
        return not math.prod(self.sizes)

    def box(self, shape: tuple[int, ...]) -> Box:
        """Which elements it has of a tensor of this shape."""
        return Box(shape, self.offsets, self.sizes)

    def within(self, whole: Tensor) -> Tensor:
        """The view of the whole tensor that this part is."""
        for axis, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            whole = whole.narrow(axis, offset, size)
        return whole


class Items:
    """Reads the parts of the tensors of one folder."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        self.folder = folder
        self._metadata = metadata
        self._maps: dict[str, FileMap] = {}
        self._parts: dict[str, list[Part]] = {}
        # Opening an item takes longer than to copy a small one.
        self._raws: dict[tuple[str, str, int], Raw | None] = {}
        self._places: dict[str, Raw | Scattered | None] = {}

    def parts(self, name: str) -> Sequence[Part]:
        """Every stored part of a tensor, in the order of its description."""
        if name not in self._parts:
            chunks = self.described(name).chunks
            self._parts[name] = [
                Part(tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length)
                for chunk, (_, info) in zip(chunks, self.infos(name), strict=True)
            ]
        return self._parts[name]

    def infos(self, name: str) -> Iterator[tuple[MetadataIndex, _StorageInfo]]:
        """Every stored item of a name, be it a tensor or not."""
        described = self._metadata.state_dict_metadata[name]
        if isinstance(described, TensorStorageMetadata):
            for i, chunk in enumerate(described.chunks):
                index = MetadataIndex(name, chunk.offsets, i)
                yield index, self._metadata.storage_data[index]
        else:
            yield MetadataIndex(name), self._metadata.storage_data[MetadataIndex(name)]

    def read(self, name: str) -> Tensor:
        """A whole tensor. It is a view of a file if it is stored in one part."""
        parts = self.parts(name)
        if len(parts) == 1:
            return self.part(name, parts[0])
        described = self.described(name)
        whole = torch.empty(described.size, dtype=described.properties.dtype)
        for part in parts:
            part.within(whole).copy_(self.part(name, part))
        return whole

    def part(self, name: str, part: Part) -> Tensor:
        """One part of a tensor, a view of its file.

        Raises:
            InputError: it is damaged, or another tensor than the folder's description says.
        """
        path = self.folder / part.file
        mapped = self._map(part.file)
        try:
            value, _ = torch_map.load_item(mapped, part.start, part.length)
        except NotMappable as error:
            raise InputError(f"{path}: damaged: {name!r} at byte {part.start:,}: {error}") from error
        expected = self.described(name).properties.dtype
        if not isinstance(value, Tensor) or tuple(value.shape) != part.sizes or value.dtype != expected:
            raise InputError(
                f"{path}: damaged: at byte {part.start:,} is not the part of {name!r} that should be there"
            )
        return value

    def raw(self, name: str, part: Part) -> Raw | None:
        """Where the values of a part are, in their logical order; None if they are not in the file like that."""
        at = name, part.file, part.start
        if at not in self._raws:
            self._raws[at] = self._find_raw(name, part)
        return self._raws[at]

    def _find_raw(self, name: str, part: Part) -> Raw | None:
        value = self.part(name, part)
        mapped = self._map(part.file)
        start = mapped.offset(value.data_ptr())
        return Raw(mapped.path, start, value.nbytes) if start is not None and value.is_contiguous() else None

    def pair(self, name: str, g: Entry, v: Entry, part: Part) -> Pair | None:
        """The pair that makes a part of a weight, which is stored as the same part of `v` is.

        None where it needs more than that part: its rows go beyond it, or the halves are cut differently.
        """
        mine = next(other for other in self.parts(v.name) if other.offsets == part.offsets)
        rows = slice(mine.offsets[0], mine.offsets[0] + mine.sizes[0]) if mine.sizes else slice(0, 0)
        if mine.sizes == v.shape:
            magnitude = self._rows(g, slice(0, g.shape[0] if g.shape else 0))
        elif mine.sizes[1:] == v.shape[1:] and len(g.shape) == len(v.shape) and g.shape[0] == v.shape[0]:
            magnitude = self._rows(g, rows)
            name = f"{name}[{rows.start}:{rows.stop}]"
        else:
            return None
        raw = self.raw(v.name, mine)
        return None if raw is None or magnitude is None else Pair(name, magnitude, Stored(raw, v.dtype, mine.sizes))

    def _rows(self, entry: Entry, rows: slice) -> Stored | None:
        """Some rows of a tensor, if one stored part has all of them."""
        for part in self.parts(entry.name):
            if part.sizes == entry.shape and rows == slice(0, entry.shape[0] if entry.shape else 0):
                raw = self.raw(entry.name, part)
                return None if raw is None else Stored(raw, entry.dtype, entry.shape)
            first = part.offsets[0] if part.offsets else 0
            if part.sizes[1:] != entry.shape[1:] or not first <= rows.start <= rows.stop <= first + part.sizes[0]:
                continue
            raw = self.raw(entry.name, part)
            if raw is not None:
                row = raw.size // part.sizes[0]
                inner = Raw(raw.path, raw.start + (rows.start - first) * row, (rows.stop - rows.start) * row)
                return Stored(inner, entry.dtype, (rows.stop - rows.start, *entry.shape[1:]))
        return None

    def place(self, name: str) -> Raw | Scattered | None:
        """Where a tensor is, if it is large, or the magnitude of one that is.

        To know that, its items must be opened, which takes longer than to read small ones.
        """
        if name not in self._places:
            self._places[name] = self._find_place(name)
        return self._places[name]

    def _find_place(self, name: str) -> Raw | Scattered | None:
        parts, described = [part for part in self.parts(name) if not part.empty], self.described(name)
        half, shape = names.plain_name(name), tuple(described.size)
        itemsize = described.properties.dtype.itemsize
        size = math.prod(shape) * itemsize
        if not size or (size < _LARGE and not (half and half[2] == "g")):
            return None
        raws = [self.raw(name, part) for part in parts]
        stored = tuple((part.box(shape), raw) for part, raw in zip(parts, raws, strict=True) if raw)
        if len(stored) != len(parts):
            return None
        return stored[0][1] if len(parts) == 1 else Scattered(stored, itemsize, size)

    def files(self) -> set[str]:
        """The files that hold items, by their names in the folder."""
        return {info.relative_path for info in self._metadata.storage_data.values()}

    def described(self, name: str) -> TensorStorageMetadata:
        """Shape, dtype and parts of a tensor."""
        return cast("TensorStorageMetadata", self._metadata.state_dict_metadata[name])

    def _map(self, name: str) -> FileMap:
        if name not in self._maps:
            self._maps[name] = FileMap(self.folder / name)
        return self._maps[name]


def parts_like(template: Sequence[Part], shape: tuple[int, ...], whole: tuple[int, ...]) -> Sequence[Part]:
    """Cut a tensor of `shape` as another one, of the shape `whole`, is cut. Each part goes where one of those is.

    Axes of length 1 that the other has longer are not cut; parts that differ only along these come together. All do
    where they would overlap otherwise, as the other is not cut in a grid.
    """
    if shape == whole:
        return template
    # A part without elements may get some when an axis goes, but they belong to the others.
    some = [part for part in template if not part.empty] or template[:1]
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], Part] = {}
    if len(shape) == len(whole):
        gone = [a != b for a, b in zip(shape, whole, strict=True)]
        for part in some:
            offsets = tuple(0 if one else n for one, n in zip(gone, part.offsets, strict=True))
            sizes = tuple(1 if one else n for one, n in zip(gone, part.sizes, strict=True))
            found.setdefault((offsets, sizes), part)
    if not found or overlap([Box(shape, *place) for place in found]):
        found = {((0,) * len(shape), shape): some[0]}
    return [dataclasses.replace(part, offsets=offsets, sizes=sizes) for (offsets, sizes), part in found.items()]
