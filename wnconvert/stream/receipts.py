"""What the engine wrote, by its CRC-32: a check of the result reads it back and has nothing to compute again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from wnconvert.files.raw import Inline, Raw
from wnconvert.sites import RowCounts, g_shape
from wnconvert.stream import engine, work
from wnconvert.stream.plan import Fold, Pair, Place, Split, Stored, Task
from wnconvert.stream.work import Result, SplitPart, Sum


class Receipt(NamedTuple):
    """What a task wrote.

    Attributes:
        task: see above.
        to: where it was told to.
        raw: the stretch that it filled.
        crc: of that.
    """

    task: Fold | Split
    to: Place
    raw: Raw
    crc: int


class Receipts:
    """What was written where. Small tensors, slabs and splits that changed a row have no receipt."""

    def __init__(self) -> None:
        self._found: dict[Raw | Inline, Receipt] = {}

    @classmethod
    def of(cls, tasks: Sequence[Task], results: Mapping[int, Sequence[Result]]) -> Receipts:
        """Take what `engine.run` returned for these tasks."""
        receipts = cls()
        for i, parts in results.items():
            task = tasks[i]
            if isinstance(task, Fold):
                receipts._take(task, task.to, parts)
            elif isinstance(task, Split) and task.v is not None and engine.outcome_of(parts) == RowCounts(0, 0):
                split = [part for part in parts if isinstance(part, SplitPart)]
                receipts._take(task, task.g, [part.g for part in split])
                receipts._take(task, task.v, [part.v for part in split])
        return receipts

    def add(self, others: Iterable[Receipts]) -> None:
        """Take the receipts of others."""
        for other in others:
            self._found |= other._found

    def proof(self, before: Stored | Pair, after: Stored | Pair) -> list[Receipt] | None:
        """What must be read back to see that a tensor of the result was made of one of the input.

        Args:
            before: the tensor of the input.
            after: the tensor of the result, of the same dtype and shape as a plain weight.

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
        if found is None or not isinstance(found.task, Fold):
            return None
        made_of = found.task.pair
        return [found] if (made_of.g, made_of.v) == (pair.g, pair.v) else None

    def _proof_of_split(self, weight: Stored, pair: Pair) -> list[Receipt] | None:
        g, v = self._found.get(pair.g.raw), self._found.get(pair.v.raw)
        if g is None or v is None or not isinstance(g.task, Split):
            return None
        task = g.task
        if (task.weight, task.g, task.v) != (weight, g.to, v.to):
            return None
        form = task.g_dtype, g_shape(weight.shape, task.axis, task.groups)
        return [g, v] if (pair.g.dtype, pair.g.shape) == form else None

    def _take(self, task: Fold | Split, to: Place, parts: Sequence[Result]) -> None:
        sums = [part for part in parts if isinstance(part, Sum)]
        if sums and len(sums) == len(parts):
            written = work.whole(sums)
            raw = Raw(to.path, to.start, written.size)
            self._found[raw] = Receipt(task, to, raw, written.crc)
