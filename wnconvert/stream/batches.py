"""Small tensors of one kind worked on as one, because a call into torch takes longer than their arithmetic.

Rows do not depend on one another, so tensors of one shape are the rows of a larger one. Whatever is out of the ordinary
(a pair that cannot be multiplied, a row of zeros, a difference) is left to the work on single tensors, which says what
it is.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from types import NoneType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from wnconvert import weightnorm
from wnconvert.errors import NotSplittable, PairError
from wnconvert.files.raw import Inline, Raw, Scattered
from wnconvert.sites import Axis, RowCounts, kept_axes
from wnconvert.stream import pieces, work
from wnconvert.stream.pieces import RUN, Run
from wnconvert.stream.plan import (
    Checksum,
    Compare,
    Copy,
    Fold,
    Pair,
    PartPlace,
    Place,
    Put,
    Split,
    Stored,
    Target,
    Task,
)
from wnconvert.stream.work import Result, SplitPart
from wnconvert.stream.workspace import Workspace, memory_of, torch_dtype

SMALL = 1 << 14
"""Elements up to which a tensor is small."""

TOGETHER = 512
"""Small tensors worked on as one."""


class Job(NamedTuple):
    """What a worker takes at a time.

    Attributes:
        parts: the tasks that it belongs to, each with the number of the piece.
        size: bytes that it goes through.
        run: does it, and returns what each part came to.
    """

    parts: Sequence[tuple[int, int]]
    size: int
    run: Callable[[Workspace], Sequence[Result]]


def jobs(tasks: Sequence[Task]) -> Iterator[Job]:
    """Cut tasks into jobs that do not depend on one another, about in their order."""
    waiting: dict[Hashable, list[int]] = {}
    for i, task in enumerate(tasks):
        kind = _kind(task)
        if kind is None:
            yield from _single(tasks, i)
            continue
        group = waiting.setdefault(kind, [])
        group.append(i)
        if len(group) == TOGETHER or len(group) * size(task) >= RUN:
            yield from _group(tasks, waiting.pop(kind))
    for group in waiting.values():
        yield from _group(tasks, group)


def size(task: Task) -> int:
    """Bytes that a task goes through."""
    if isinstance(task, Put):
        return len(task.data)
    if isinstance(task, (Copy, Checksum)):
        return task.source.size
    if (isinstance(task, Fold) and isinstance(task.to, PartPlace)) or (
        isinstance(task, Split) and isinstance(task.v, PartPlace)
    ):
        # Only some of its pieces are worked on.
        return sum(size for size, _ in work.units(task))
    return _elements(task) * _itemsize(task) * (2 if isinstance(task, Compare) else 1)


def _single(tasks: Sequence[Task], i: int) -> Iterator[Job]:
    for number, (size, unit) in enumerate(work.units(tasks[i])):
        yield Job(((i, number),), size, functools.partial(_alone, unit))


def _alone(unit: Callable[[Workspace], Result], space: Workspace) -> Sequence[Result]:
    return (unit(space),)


def _group(tasks: Sequence[Task], group: Sequence[int]) -> Iterator[Job]:
    run = _run_of(tasks[group[0]])
    if run is None or len(group) == 1:
        for i in group:
            yield from _single(tasks, i)
        return
    chosen = [tasks[i] for i in group]
    yield Job([(i, 0) for i in group], sum(map(size, chosen)), functools.partial(_together, chosen, run))


def _run_of(task: Task) -> Run | None:
    """The one run that a small tensor is, or None if it is cut in another way."""
    if isinstance(task, Split):
        cut = list(pieces.cut(task.weight.shape, task.axis, task.groups, _itemsize(task)))
    else:
        pair = _pair(task)
        # Two plain tensors are compared whole.
        cut = [_WHOLE] if pair is None else list(work.pieces_of(pair))
    return cut[0] if len(cut) == 1 and isinstance(cut[0], Run) else None


_WHOLE = Run(0, (), None, 0, 1)


def _pair(task: Task) -> Pair | None:
    sides = [task.pair] if isinstance(task, Fold) else [task.a, task.b] if isinstance(task, Compare) else []
    return next((side for side in sides if isinstance(side, Pair)), None)


def _together(tasks: list[Task], run: Run, space: Workspace) -> Sequence[Result]:
    found: Sequence[Result] | None = None
    with contextlib.suppress(PairError, NotSplittable):
        if isinstance(tasks[0], Fold):
            found = _fold(cast("list[Fold]", tasks), run, space)
        elif isinstance(tasks[0], Split):
            found = _split(cast("list[Split]", tasks), run, space)
        else:
            found = _compare(cast("list[Compare]", tasks), run, space)
    return found or [unit(space) for task in tasks for _, unit in work.units(task)]


def _fold(tasks: list[Fold], run: Run, space: Workspace) -> Sequence[Result]:
    values = _folded([task.pair for task in tasks], run, space, "v")
    for task, part in zip(tasks, _parts(values, len(tasks)), strict=True):
        _write(space, task.to, part)
    return [None] * len(tasks)


def _split(tasks: list[Split], run: Run, space: Workspace) -> Sequence[Result] | None:
    first = tasks[0]
    w = _read("v", [task.weight.raw for task in tasks], space).view(torch_dtype(first.weight.dtype))
    g, v = weightnorm.split(
        w.view(len(tasks), *run.shape),
        _below(run),
        g_dtype=torch_dtype(first.g_dtype),
        overwrite=True,
        scratch=space.scratch,
    )
    if weightnorm.row_counts(g, v.dtype) != RowCounts(0, 0):
        return None
    for task, part_g, part_v in zip(tasks, _parts(g, len(tasks)), _parts(v, len(tasks)), strict=True):
        _write(space, task.g, part_g)
        if task.v is not None:
            _write(space, task.v, part_v)
    return [SplitPart(RowCounts(0, 0), None)] * len(tasks)


def _compare(tasks: list[Compare], run: Run, space: Workspace) -> Sequence[Result] | None:
    sides = []
    for role, side in (("v", [task.a for task in tasks]), ("other", [task.b for task in tasks])):
        if isinstance(side[0], Pair):
            sides.append(memory_of(_folded(cast("list[Pair]", side), run, space, role)))
        else:
            sides.append(memory_of(_read(role, [cast("Stored", stored).raw for stored in side], space)))
    return [None] * len(tasks) if sides[0] == sides[1] else None


def _folded(pairs: list[Pair], run: Run, space: Workspace, role: str) -> Tensor:
    g = _read("g", [pair.g.raw for pair in pairs], space).view(torch_dtype(pairs[0].g.dtype))
    v = _read(role, [pair.v.raw for pair in pairs], space).view(torch_dtype(pairs[0].v.dtype))
    shape = (len(pairs), *run.shape)
    kept = kept_axes(_below(run), len(shape))
    g = g.view(tuple(n if i in kept else 1 for i, n in enumerate(shape)))
    return weightnorm.fold(g, v.view(shape), overwrite=True, scratch=space.scratch)


def _read(role: str, raws: Sequence[Raw | Inline | Scattered], space: Workspace) -> Tensor:
    """The bytes of tensors of one size, one after the other."""
    size = raws[0].size
    data = space.buffer(role, size * len(raws))
    for raw, part in zip(raws, _parts(data, len(raws)), strict=True):
        space.fill(part, raw)
    return data


def _write(space: Workspace, to: Target | None, data: memoryview) -> None:
    place = cast("Place", to)
    space.files.write(place.path, place.start, data)


def _parts(values: Tensor, count: int) -> Iterator[memoryview]:
    memory = memory_of(values)
    size = memory.nbytes // count
    for i in range(count):
        yield memory[i * size : (i + 1) * size]


def _below(run: Run) -> Axis:
    """The kept axes of runs on top of one another."""
    return (0, *(i + 1 for i in kept_axes(run.axis, len(run.shape))))


def _kind(task: Task) -> Hashable | None:
    """The same for tasks that can be done as one; None for one that is not small, or does not go to a file whole."""
    if not isinstance(task, (Fold, Split, Compare)) or not 0 < _elements(task) <= SMALL:
        return None
    if isinstance(task, Fold):
        return (Fold, *_form(task.pair)) if isinstance(task.to, Place) else None
    if isinstance(task, Split):
        if not isinstance(task.g, Place) or not isinstance(task.v, (Place, NoneType)):
            return None
        return Split, *_form(task.weight), task.axis, task.groups, task.g_dtype
    return Compare, _form(task.a), _form(task.b)


def _form(side: Stored | Pair) -> tuple[Any, ...]:
    if isinstance(side, Pair):
        return _form(side.g), _form(side.v)
    return side.dtype, side.shape, side.raw.size


def _stored(task: Task) -> Stored:
    """The tensor that gives a task its size."""
    if isinstance(task, Fold):
        return task.pair.v
    if isinstance(task, Split):
        return task.weight
    side = cast("Compare", task).a
    return side.v if isinstance(side, Pair) else side


def _elements(task: Task) -> int:
    return math.prod(_stored(task).shape)


def _itemsize(task: Task) -> int:
    dtype = getattr(torch, _stored(task).dtype, None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 1
