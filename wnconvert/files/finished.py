"""Which parts of an interrupted conversion are done, so that the next run can go on from there."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from wnconvert import __version__
from wnconvert.errors import InputError
from wnconvert.files.entries import Entry
from wnconvert.files.staging import FINISHED
from wnconvert.files.written import Outcomes, Written
from wnconvert.sites import RowCounts


class Finished:
    """One small note per finished file, in the staging folder beside what it will become."""

    def __init__(self, folder: Path) -> None:
        """Take the staging folder."""
        self._folder = folder / FINISHED

    def find(self, path: Path, name: str, mark: str) -> Written | None:
        """What was said about a file, if an earlier run finished it, or None if it did not.

        Args:
            path: the file.
            name: under which it was added.
            mark: see `mark_of`.

        Raises:
            InputError: it was made from something else.
        """
        from wnconvert.stream import engine

        try:
            noted = _Note.read(self._note(name))
        except (FileNotFoundError, ValueError, TypeError):
            # Never written, or lost with the power.
            return None
        if noted.mark != mark:
            raise InputError(
                f"{self._folder.parent}: was begun with other options or another input; run again without --resume"
            )
        size = path.stat().st_size if path.is_file() else -1
        return noted.written if size == noted.size and engine.checksum(path) == noted.crc else None

    def add(self, path: Path, name: str, mark: str, written: Written) -> None:
        """Note that a file is complete and on the disk."""
        from wnconvert.stream import engine

        with path.open("rb") as file:
            os.fsync(file.fileno())
        note = self._note(name)
        note.parent.mkdir(parents=True, exist_ok=True)
        _Note(mark, path.stat().st_size, engine.checksum(path), written).write(note)

    def _note(self, name: str) -> Path:
        return self._folder / f"{name}.json"


@dataclasses.dataclass(frozen=True, slots=True)
class _Note:
    """What is known about a finished file."""

    mark: str
    size: int
    crc: int
    written: Written

    @classmethod
    def read(cls, path: Path) -> _Note:
        """Raises `ValueError` or `TypeError` for anything but what `write` writes."""
        mark, size, crc, outcomes, places = json.loads(path.read_text(encoding="utf-8"))
        counted: Outcomes = {
            name: outcome if isinstance(outcome, str) else RowCounts(*outcome)
            for name, outcome in dict(outcomes).items()
        }
        return cls(mark, size, crc, Written(counted, [(start, length) for start, length in places]))

    def write(self, path: Path) -> None:
        """It is there as a whole or not at all."""
        content = [self.mark, self.size, self.crc, dict(self.written.outcomes), list(self.written.places)]
        unfinished = path.with_name(f"{path.name}.new")
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)


def mark_of_inputs(inputs: Iterable[Path]) -> int:
    """The same for files that are the same by name, size and time of change.

    Raises:
        InputError: one is gone.
    """
    mark = zlib.crc32(__version__.encode())
    for path in inputs:
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        mark = zlib.crc32(f"{path} {status.st_mtime_ns} {status.st_size}".encode(), mark)
    return mark


def mark_of(inputs: int, content: Iterable[object]) -> str:
    """The same for two plans of one file exactly if they make the same of the same inputs.

    Args:
        inputs: see `mark_of_inputs`.
        content: what goes into the file, in order, all that matters in its `repr`.
    """
    mark = inputs
    for item in content:
        mark = zlib.crc32(repr(item).encode(), mark)
    return f"{mark:08x}"


def described(entry: Entry) -> tuple[object, ...]:
    """What a tensor is made of, for `mark_of`."""
    return entry.name, entry.dtype, entry.shape, entry.requires_grad, entry.raw, entry.made
