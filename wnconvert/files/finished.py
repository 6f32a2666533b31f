"""Which shards of an interrupted conversion are done, so that the next run can go on from there."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wnconvert.errors import InputError
from wnconvert.files.raw import Inline, Raw
from wnconvert.files.staging import FINISHED
from wnconvert.sites import RowCounts
from wnconvert.stream.plan import Copy, Fold, Split, Task


class Finished:
    """One small file per finished shard, in the staging folder beside what it will become."""

    def __init__(self, folder: Path) -> None:
        """Take the staging folder."""
        self._folder = folder / FINISHED

    def find(self, shard: Path, name: str, mark: str) -> Mapping[str, RowCounts | str] | None:
        """What the splits in a shard came to, if an earlier run finished it, or None if it did not.

        Args:
            shard: the file.
            name: under which it was added.
            mark: see `mark_of`.

        Raises:
            InputError: it was made from something else.
        """
        from wnconvert.stream import engine

        try:
            noted: dict[str, Any] = json.loads(self._note(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        if noted["mark"] != mark:
            raise InputError(
                f"{self._folder.parent}: was begun with other options or another input; run again without --resume"
            )
        size = shard.stat().st_size if shard.is_file() else -1
        if size != noted["size"] or engine.checksum(shard) != noted["crc"]:
            return None
        return {
            key: outcome if isinstance(outcome, str) else RowCounts(*outcome)
            for key, outcome in noted["outcomes"].items()
        }

    def add(self, shard: Path, name: str, mark: str, outcomes: Mapping[str, RowCounts | str]) -> None:
        """Note that a shard is complete and on the disk."""
        from wnconvert.stream import engine

        with shard.open("rb") as file:
            os.fsync(file.fileno())
        noted = {
            "mark": mark,
            "size": shard.stat().st_size,
            "crc": engine.checksum(shard),
            "outcomes": dict(outcomes),
        }
        note = self._note(name)
        note.parent.mkdir(parents=True, exist_ok=True)
        unfinished = note.with_name(f"{note.name}.new")
        unfinished.write_text(json.dumps(noted), encoding="utf-8")
        unfinished.replace(note)

    def _note(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def mark_of(tasks: Sequence[Task]) -> str:
    """The same for two plans of one shard exactly if they make the same file of the same inputs."""
    mark = 0
    times: dict[Path, int] = {}
    for task in tasks:
        for path in _inputs(task):
            if path not in times:
                times[path] = path.stat().st_mtime_ns
                mark = zlib.crc32(f"{path} {times[path]} {path.stat().st_size}".encode(), mark)
        mark = zlib.crc32(repr(task).encode(), mark)
    return f"{mark:08x}"


def _inputs(task: Task) -> Iterable[Path]:
    if isinstance(task, Copy):
        return (task.source.path,)
    read: tuple[Raw | Inline, ...]
    if isinstance(task, Fold):
        read = (task.pair.g.raw, task.pair.v.raw)
    elif isinstance(task, Split):
        read = (task.weight.raw,)
    else:
        read = ()
    return (raw.path for raw in read if isinstance(raw, Raw))
