"""Write a folder of torch.distributed.checkpoint as that library's own writer does.

Each item is written by torch.save, and all are listed by `FileSystemWriter.finish`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.storage import WriteResult

from wnconvert.files import torch_skeleton
from wnconvert.files.dcp_plan import Plan, Record
from wnconvert.files.entries import Raw
from wnconvert.files.filling import Filling, Held
from wnconvert.files.stand_ins import StandIns
from wnconvert.files.written import Written
from wnconvert.watch import Watcher


class _Writer(FileSystemWriter):
    """Lists items that are written already."""

    def __init__(self, folder: Path, origin: StorageMeta | None) -> None:
        super().__init__(folder)
        self._origin = origin

    def storage_meta(self) -> StorageMeta | None:
        """What the input says of itself: where the folder is while it is written is nobody's concern."""
        return self._origin


def write(path: Path, records: Sequence[Record], watcher: Watcher) -> Written:
    """Write one file.

    Args:
        path: of the file. What an earlier attempt left there goes away.
        records: what goes into it, in order.
        watcher: is told how far it is.

    Returns:
        See `Filling.run`. The places are those of the items.
    """
    filling, stand_ins = Filling(), StandIns([])
    places = []
    with path.open("w+b") as file:
        for record in records:
            start = file.seek(0, os.SEEK_END)
            _write(file, path, record, filling, stand_ins)
            places.append((start, file.seek(0, os.SEEK_END) - start))
    return dataclasses.replace(filling.run(watcher), places=places)


def describe(target: Path, plan: Plan, places: Mapping[str, Sequence[tuple[int, int]]]) -> None:
    """Write the description of a folder whose files are all there.

    Args:
        target: the folder.
        plan: of everything in it.
        places: what `write` said about each file.
    """
    results = [
        WriteResult(record.index, size, _StorageInfo(record.file, start, size))
        for name, records in plan.files.items()
        for record, (start, size) in zip(records, places[name], strict=True)
    ]
    _Writer(target, plan.origin).finish(plan.metadata(), [results])


def _write(file: IO[bytes], path: Path, record: Record, filling: Filling, stand_ins: StandIns) -> None:
    source = record.source
    if isinstance(source, Raw):
        start = file.tell()
        file.truncate(start + source.size)
        filling.copy(path, start, source)
        return
    stand_in = stand_ins.new(dataclasses.replace(source.entry, shape=source.part.sizes))
    content = source.made or Held(source.load, stand_in.stride())
    filling.add(path, torch_skeleton.write(file, stand_in), lambda _: content)
