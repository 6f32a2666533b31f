"""What the engine wrote, by its CRC-32: a check of the result reads it back and has nothing to compute again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from wnconvert.files.raw import Inline, Raw, Scattered
from wnconvert.sites import RowCounts, g_shape
from wnconvert.stream import engine, work
from wnconvert.stream.plan import Fold, Pair, Place, Split, Stored, Target, Task
from wnconvert.stream.work import Result, SplitPart, Sum


class Receipt(NamedTuple):
    """What a task wrote.

    Attributes:
        task: the task.
        raw: the stretch that it filled.
        crc: the CRC-32 of that.
    """

    task: Fold | Split
    raw: Raw
    crc: int

    @property
    def to(self) -> Place:
        """Where the task was told to write."""
        return Place(self.raw.path, self.raw.start)


class Receipts:
    """What was written where.

    There is no receipt for small tensors that were worked on together, for slabs, for splits that changed a row, and
    for what went into several files.
    """

    def __init__(self, tasks: Sequence[Task] = ()) -> None:
        """Take what is about to be done."""
        self._tasks = tasks
        self._inputs = {path: _state(path) for path in {path for task in tasks for path in _sources(task)}}
        self._found: dict[Raw | Inline | Scattered, Receipt] = {}

    def taken(self, results: Mapping[int, Sequence[Result]]) -> Receipts:
        """Take what `engine.run` returned for the tasks, and return this."""
        for i, parts in results.items():
            task = self._tasks[i]
            if isinstance(task, Fold):
                self._take(task, task.to, parts)
            elif isinstance(task, Split) and engine.outcome_of(parts) == RowCounts(0, 0):
                split = [part for part in parts if isinstance(part, SplitPart)]
                self._take(task, task.g, [part.g for part in split])
                self._take(task, task.v, [part.v for part in split])
        self._tasks = ()
        return self

    @classmethod
    def together(cls, parts: Iterable[Receipts]) -> Receipts:
        """Those of several files."""
        whole = cls()
        for part in parts:
            whole._inputs |= part._inputs
            whole._found |= part._found
        return whole

    def forget_changed(self) -> None:
        """Drop everything if an input is not what it was: then what was made of it says nothing about what it is."""
        if any(_state(path) != state for path, state in self._inputs.items()):
            self._found.clear()

    def proof(self, before: Stored | Pair, after: Stored | Pair) -> list[Receipt] | None:
        """What must be read back to see that a tensor of the result was made of one of the input.

        Args:
            before: the tensor of the input.
            after: the tensor of the result.

        Returns:
            None if that is not known, and the two have to be compared.
        """
        if isinstance(before, Pair) and isinstance(after, Stored):
            return self._proof_of_fold(before, after)
        if isinstance(before, Stored) and isinstance(after, Pair):
            return self._proof_of_split(before, after)
        return None

    def _proof_of_fold(self, pair: Pair, weight: Stored) -> list[Receipt] | None:
        found = self._found.get(weight.raw)
        if found is None or not isinstance(found.task, Fold) or _form(weight) != _form(pair.v):
            return None
        made_of = found.task.pair
        return [found] if (made_of.g, made_of.v) == (pair.g, pair.v) else None

    def _proof_of_split(self, weight: Stored, pair: Pair) -> list[Receipt] | None:
        g, v = self._found.get(pair.g.raw), self._found.get(pair.v.raw)
        if g is None or v is None or g.task != v.task or not isinstance(g.task, Split):
            return None
        task = g.task
        if (task.weight, task.g, task.v) != (weight, g.to, v.to) or _form(pair.v) != _form(weight):
            return None
        form = task.g_dtype, g_shape(weight.shape, task.axis, task.groups)
        return [g, v] if _form(pair.g) == form else None

    def _take(self, task: Fold | Split, to: Target | None, parts: Sequence[Result]) -> None:
        sums = [part for part in parts if isinstance(part, Sum)]
        if isinstance(to, Place) and sums and len(sums) == len(parts):
            written = work.whole(sums)
            raw = Raw(to.path, to.start, written.size)
            self._found[raw] = Receipt(task, raw, written.crc)


def _form(stored: Stored) -> tuple[str, tuple[int, ...]]:
    return stored.dtype, stored.shape


def _sources(task: Task) -> Iterator[Path]:
    """The files that a pair or a weight is in."""
    stored = [task.pair.g, task.pair.v] if isinstance(task, Fold) else [task.weight] if isinstance(task, Split) else []
    for tensor in stored:
        if isinstance(tensor.raw, Raw):
            yield tensor.raw.path
        elif isinstance(tensor.raw, Scattered):
            yield from (raw.path for _, raw in tensor.raw.parts)


def _state(path: Path) -> tuple[int, ...] | None:
    """The same while nobody writes to a file or puts another one in its place; None if it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
