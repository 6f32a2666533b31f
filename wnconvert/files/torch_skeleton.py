"""Write a file of `torch.save` with holes where its storages go, to be filled by whoever has their bytes.

torch itself lays the archive out (`torch.serialization.skip_data`). What remains is to fill the holes and to write down
the checksums of what was filled in.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
import pickle
import types
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

import torch

from wnconvert.files.file_map import Window
from wnconvert.files.torch_map import data_start

_CRC_IN_DIRECTORY = 16
_DIRECTORY_HEADER = 46
_CRC_IN_DESCRIPTOR = 4
_IDENTITY = ".data/serialization_id"


@dataclasses.dataclass(frozen=True, slots=True)
class Hole:
    """The place of one storage in the file.

    Attributes:
        storage: what goes there, as it was pickled.
        start: of its bytes.
        size: of its bytes, never 0.
        checksums: where its CRC-32 goes, four bytes each, little-endian.
    """

    storage: torch.UntypedStorage
    start: int
    size: int
    checksums: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """The place of the record that torch derives from all others. Attributes as those of `Hole`."""

    start: int
    size: int
    checksums: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Skeleton:
    """One archive of a file, complete but for the bytes of its storages and what follows from them.

    Attributes:
        holes: where the storages go, in the order of the file.
        checksums: CRC-32 of every record that is not empty, in the order of the file; None for those of `holes`.
        identity: the record that follows from all others.
    """

    holes: tuple[Hole, ...]
    checksums: tuple[int | None, ...]
    identity: Identity | None


def write(file: IO[bytes], root: object) -> Skeleton:
    """Write an archive at the end of an open file, all but the bytes of its storages, which are not looked at.

    Args:
        file: open for reading and writing.
        root: anything that torch.save takes.

    Raises:
        RuntimeError, TypeError, pickle.PicklingError...: as torch.save does on what cannot be saved.
    """
    storages: dict[str, torch.UntypedStorage] = {}
    origin = file.seek(0, os.SEEK_END)
    with torch.serialization.skip_data():
        torch.save(root, file, pickle_module=_recorder(storages))
    file.flush()
    window = io.BufferedReader(Window(file, origin, file.tell() - origin))
    holes: list[Hole] = []
    checksums: list[int | None] = []
    identity = None
    for name, info, directory in _records(window):
        start = origin + data_start(window, info)
        places = (start + info.file_size + _CRC_IN_DESCRIPTOR, origin + directory + _CRC_IN_DIRECTORY)
        folder, _, key = name.partition("/")
        if name == _IDENTITY:
            identity = Identity(start, info.file_size, places)
        elif info.file_size:
            is_hole = folder == "data"
            checksums.append(None if is_hole else info.CRC)
            if is_hole:
                holes.append(Hole(storages[key], start, info.file_size, places))
    file.seek(0, os.SEEK_END)
    return Skeleton(tuple(holes), tuple(checksums), identity)


def settle(file: IO[bytes], skeleton: Skeleton, checksums: Iterable[int]) -> None:
    """Write down the checksums of what was filled in, one for each hole, in order."""
    filled = iter(checksums)
    every = [next(filled) if known is None else known for known in skeleton.checksums]
    of_holes = [crc for crc, known in zip(every, skeleton.checksums, strict=True) if known is None]
    for hole, crc in zip(skeleton.holes, of_holes, strict=True):
        _note(file, hole, crc)
    if skeleton.identity is not None:
        # 20 digits for the names of the records, which are there, and 20 for their contents.
        file.seek(skeleton.identity.start)
        text = file.read(skeleton.identity.size)[:20] + b"%020d" % functools.reduce(_combine, every, 0)
        file.seek(skeleton.identity.start)
        file.write(text)
        _note(file, skeleton.identity, zlib.crc32(text))


def _note(file: IO[bytes], hole: Hole | Identity, crc: int) -> None:
    for place in hole.checksums:
        file.seek(place)
        file.write(crc.to_bytes(4, "little"))


def _combine(seed: int, value: int) -> int:
    """As `c10::hash_combine` does."""
    return (seed ^ (value + 0x9E3779B9 + (seed << 6) + (seed >> 2))) & 0xFFFFFFFFFFFFFFFF


def _records(file: IO[bytes]) -> Iterator[tuple[str, zipfile.ZipInfo, int]]:
    """Yield the records of an archive: the name without the leading folder, the record, its place in the directory."""
    with zipfile.ZipFile(file) as archive:
        position = archive.start_dir
        for info in archive.infolist():
            yield info.filename.partition("/")[2], info, position
            position += _DIRECTORY_HEADER + len(info.orig_filename.encode()) + len(info.extra) + len(info.comment)


def _recorder(storages: dict[str, torch.UntypedStorage]) -> types.SimpleNamespace:
    """A pickle module whose pickler notes which storage torch gives which number."""

    class Recorder(pickle.Pickler):
        def __init_subclass__(cls, **options: Any) -> None:
            super().__init_subclass__(**options)
            persistent_id = cls.persistent_id

            def noting(self: Any, value: Any) -> Any:
                found = persistent_id(self, value)
                if found is not None:
                    storages[found[2]] = value if isinstance(value, torch.UntypedStorage) else value._untyped_storage
                return found

            cls.persistent_id = noting  # type: ignore[method-assign]

    return types.SimpleNamespace(Pickler=Recorder, __name__=pickle.__name__)
