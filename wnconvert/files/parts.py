"""Write a result of several files: each by one of the processes that work on it, and none that is there already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from wnconvert.files.finished import Finished
from wnconvert.files.written import Written
from wnconvert.ranks import Ranks, shares


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One file of a result.

    Attributes:
        path: to write.
        size: about how many bytes that is.
        mark: gives `finished.mark_of`.
        write: does it.
    """

    path: Path
    size: int
    mark: Callable[[], str]
    write: Callable[[], Written]


def write(staging: Path, parts: Mapping[str, Part], crew: Ranks) -> dict[str, Written]:
    """Write every file. All processes call this with the same parts.

    Args:
        staging: the folder that holds the notes on what is done.
        parts: the files by name.
        crew: the processes.

    Returns:
        What there is to say about each file, in their order, on every process.

    Raises:
        InputError: an input cannot be read, or what is there was made of something else.
        PairError: a pair cannot be multiplied.
        OSError: an output cannot be written.
        RankDied: another process is gone.
    """
    finished = Finished(staging)
    sizes = {name: part.size for name, part in parts.items()}
    mine = set(shares(sizes, crew.count)[crew.rank])

    def write_mine() -> dict[str, Written]:
        return {name: _write(finished, name, parts[name]) for name in parts if name in mine}

    written: dict[str, Written] = {}
    for share in crew.together(write_mine):
        written |= share
    return {name: written[name] for name in parts}


def _write(finished: Finished, name: str, part: Part) -> Written:
    mark = part.mark()
    written = finished.find(part.path, name, mark)
    if written is None:
        part.path.parent.mkdir(parents=True, exist_ok=True)
        written = part.write()
        finished.add(part.path, name, mark, written)
    return written
