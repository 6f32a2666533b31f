"""Which parts of an interrupted conversion are done, so that the next run can go on from there."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wnconvert import __version__
from wnconvert.errors import InputError
from wnconvert.files.entries import Entry
from wnconvert.files.staging import FINISHED
from wnconvert.sites import RowCounts


@dataclasses.dataclass(frozen=True, slots=True)
class Written:
    """What there is to say about one finished file.

    Attributes:
        outcomes: what the splits in it came to, by the name of the weight.
        places: `(start, size)` of what is in it, where its format needs that.
    """

    outcomes: Mapping[str, RowCounts | str]
    places: Sequence[tuple[int, int]] = ()


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
            noted: dict[str, Any] = json.loads(self._note(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        if noted["mark"] != mark:
            raise InputError(
                f"{self._folder.parent}: was begun with other options or another input; run again without --resume"
            )
        size = path.stat().st_size if path.is_file() else -1
        if size != noted["size"] or engine.checksum(path) != noted["crc"]:
            return None
        outcomes = {
            key: outcome if isinstance(outcome, str) else RowCounts(*outcome)
            for key, outcome in noted["outcomes"].items()
        }
        return Written(outcomes, [(start, size) for start, size in noted["places"]])

    def add(self, path: Path, name: str, mark: str, written: Written) -> None:
        """Note that a file is complete and on the disk."""
        from wnconvert.stream import engine

        with path.open("rb") as file:
            os.fsync(file.fileno())
        noted = {
            "mark": mark,
            "size": path.stat().st_size,
            "crc": engine.checksum(path),
            "outcomes": dict(written.outcomes),
            "places": list(written.places),
        }
        note = self._note(name)
        note.parent.mkdir(parents=True, exist_ok=True)
        unfinished = note.with_name(f"{note.name}.new")
        unfinished.write_text(json.dumps(noted), encoding="utf-8")
        unfinished.replace(note)

    def _note(self, name: str) -> Path:
        return self._folder / f"{name}.json"


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
