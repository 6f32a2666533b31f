"""The data files of an ONNX model that is saved: which of them stay, which are copied, and what is new."""

from __future__ import annotations

import collections
import filecmp
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from onnx import TensorProto

from wnconvert.carriers.onnx.external import Slice, refer
from wnconvert.errors import InputError
from wnconvert.files.raw import Raw
from wnconvert.stream import fileio
from wnconvert.stream.plan import Copy, Place

INLINE = 1024
"""New tensors below this many bytes are written into the model itself."""

_ALIGNMENT = 4096
"""New tensors start on a page, so that a runtime can map them."""


class DataFiles:
    """The data files of the input, by location, on their way into a staging folder.

    A file that already is where the result needs it stays what it is, and is linked, so that the staged model can be
    read. Others are copied, except for the tensors that get other values there.

    Args:
        source: the folder of the input.
        folder: the staging folder, whose own folder is where the result will be.
    """

    def __init__(self, source: Path, folder: Path) -> None:
        self._source, self._folder = source, folder
        self._staying: dict[str, bool] = {}
        self._sizes: dict[str, int] = {}
        self._apart: set[tuple[str, int, int]] = set()
        self._changed: set[str] = set()
        self._holes: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)

    def stays(self, location: str) -> bool:
        """Whether the file already is where the result needs it."""
        if location not in self._staying:
            origin, final = self._source / location, self._folder.parent / location
            self._staying[location] = final.exists() and (
                final.samefile(origin) or filecmp.cmp(final, origin, shallow=False)
            )
        return self._staying[location]

    def take(self, parts: Iterable[Slice], changing: Iterable[Slice]) -> None:
        """Make the files that hold these tensors: links, or files in their final size with nothing in them.

        Args:
            parts: every tensor of the result that a file of the input has room for.
            changing: those among them that may get other values.

        Raises:
            InputError: another file is in the way.
        """
        parts = list(parts)
        self._apart = _apart(parts)
        may_change = {part.location for part in changing}
        for location in sorted({part.location for part in parts}):
            final, staged = self._folder.parent / location, self._folder / location
            staged.parent.mkdir(parents=True, exist_ok=True)
            size = (self._source / location).stat().st_size
            if self.stays(location):
                staged.symlink_to(final.resolve())
                continue
            # An earlier result may be there, which is found out when this one is written.
            if final.exists() and (location not in may_change or not _has_size(final, size)):
                raise _in_the_way(final)
            fileio.create(staged, size)
            self._sizes[location] = size

    def place(self, part: Slice) -> Place | None:
        """Where in a copied file a tensor gets other values, or None if there is no room for them."""
        if part.location not in self._sizes or (part.location, part.offset, part.length) not in self._apart:
            return None
        self._changed.add(part.location)
        return Place(self._folder / part.location, part.offset)

    def leave_out(self, part: Slice) -> None:
        """Do not copy these bytes."""
        self._holes[part.location].append((part.offset, part.length))

    def copies(self) -> Iterator[Copy]:
        """What has to be copied."""
        for location, size in self._sizes.items():
            at = 0
            for start, length in [*sorted(self._holes[location]), (size, 0)]:
                if start > at:
                    source = Raw(self._source / location, at, start - at)
                    yield Copy(source, Place(self._folder / location, at))
                at = start + length

    def finish(self, model: str) -> dict[str, str]:
        """Look whether what is in the way of a written file is the same.

        Args:
            model: name of the model.

        Returns:
            New locations of files with other values than in the input, where the old one is taken.

        Raises:
            InputError: a file is in the way of one that is that of the input.
        """
        renamed = {}
        for location in self._sizes:
            final, staged = self._folder.parent / location, self._folder / location
            if not final.exists():
                continue
            if filecmp.cmp(final, staged, shallow=False):
                staged.unlink()
                staged.symlink_to(final.resolve())
            elif location in self._changed:
                renamed[location] = _free_name(self._folder, model)
                staged.rename(self._folder / renamed[location])
            else:
                raise _in_the_way(final)
        return renamed


class NewData:
    """Tensors for which no file of the input has room: small ones go into the model itself, others into a new file.

    Args:
        folder: the staging folder, with the other data files in it.
        model: name of the model.
    """

    def __init__(self, folder: Path, model: str) -> None:
        name = _free_name(folder, model)
        self._path, self._size = folder / name, 0
        # The engine writes to files only.
        self._small, self._small_size = folder / f".{name}.small", 0
        self._inline: list[tuple[TensorProto, int, int]] = []

    def place(self, tensor: TensorProto, size: int, *, inline: bool = False) -> Place:
        """Room for the data of a tensor, which from now on has it there.

        Args:
            tensor: of the result.
            size: bytes.
            inline: it goes into the model even if it is not small.
        """
        if inline or size < INLINE:
            place = Place(self._small, self._small_size)
            self._inline.append((tensor, place.start, size))
            self._small_size += size
            return place
        start = self._size + -self._size % _ALIGNMENT
        self._size = start + size
        refer(tensor, self._path.name, start, size)
        return Place(self._path, start)

    def create(self) -> None:
        """Make the files, or make them larger."""
        for path, size in ((self._path, self._size), (self._small, self._small_size)):
            if size:
                path.touch()
                os.truncate(path, size)

    def finish(self) -> None:
        """Put what was written for small tensors into them."""
        if self._small_size:
            with self._small.open("rb") as file:
                for tensor, start, size in self._inline:
                    file.seek(start)
                    tensor.ClearField("data_location")
                    del tensor.external_data[:]
                    tensor.raw_data = file.read(size)
            self._small.unlink()


def _free_name(folder: Path, model: str) -> str:
    """A name for a data file, that of the model with `.data`, and a number where that is taken."""
    name, count = f"{model}.data", 1
    while os.path.lexists(folder.parent / name) or os.path.lexists(folder / name):
        count += 1
        name = f"{model}.{count}.data"
    return name


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _in_the_way(path: Path) -> InputError:
    return InputError(f"{path}: exists and is not the data of this model; write the result to another folder")


def _apart(parts: Iterable[Slice]) -> set[tuple[str, int, int]]:
    """The places of tensors that share no byte with another."""
    found: set[tuple[str, int, int]] = set()
    last: tuple[str, int, int] | None = None
    for place in sorted((part.location, part.offset, part.length) for part in parts if part.length):
        if last is None or place[0] != last[0] or place[1] >= last[1] + last[2]:
            found.add(place)
            last = place
        else:
            found.discard(last)
            # The one that reaches further may meet the next, too.
            last = max(last, place, key=lambda p: p[1] + p[2])
    return found
