"""One function per kind of task: the units it is made of, and how a worker does one."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wnconvert import bits, crc, weightnorm
from wnconvert.errors import NotSplittable
from wnconvert.files.raw import Raw
from wnconvert.sites import g_shape, pair_axis
from wnconvert.stream import pieces, slabs
from wnconvert.stream.pieces import Run, Slab
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
from wnconvert.stream.workspace import COPY, Workspace, memory_of, torch_dtype


class Sum(NamedTuple):
    """The CRC-32 of some bytes, and how many they are."""

    crc: int
    size: int


class SplitPart(NamedTuple):
    """What splitting one piece of a weight came to: its halves as they were written, where each is one stretch."""

    counts: weightnorm.RowCounts
    problem: str | None
    g: Sum | None = None
    v: Sum | None = None


class Mismatch(NamedTuple):
    """How one piece of two tensors differs."""

    values: int
    ulp: int | None


Result = SplitPart | Mismatch | Sum | None
Unit = tuple[int, Callable[[Workspace], Result]]
"""Bytes that it goes through, and the work itself."""


def units(task: Task) -> Iterator[Unit]:
    """Cut a task into units that do not depend on one another."""
    if isinstance(task, Put):
        yield len(task.data), functools.partial(_put, task)
    elif isinstance(task, Copy):
        yield from _copies(task)
    elif isinstance(task, Split):
        stored = task.weight
        for piece in pieces.cut(stored.shape, task.axis, task.groups, _itemsize(stored)):
            if _wanted(task.v, piece):
                yield piece.size * _itemsize(stored), functools.partial(_split, task, piece)
    elif isinstance(task, Fold):
        for piece in pieces_of(task.pair):
            if _wanted(task.to, piece):
                yield piece.size * _itemsize(task.pair.v), functools.partial(_fold, task, piece)
    elif isinstance(task, Checksum):
        for source in _blocks(task.source):
            yield source.size, functools.partial(_checksum, source)
    else:
        yield from _comparisons(task)


def _wanted(to: Target | None, piece: Run | Slab) -> bool:
    """Whether any of a piece is to be written. What a slab has is spread over the tensor."""
    if not isinstance(to, PartPlace) or isinstance(piece, Slab):
        return True
    return bool(to.box.runs(piece.start, piece.start + piece.size))


def _put(task: Put, space: Workspace) -> None:
    space.files.write(task.to.path, task.to.start, memoryview(task.data))


def _copies(task: Copy) -> Iterator[Unit]:
    for source in _blocks(task.source):
        to = Place(task.to.path, task.to.start + source.start - task.source.start)
        yield source.size, functools.partial(_copy, source, to)


def _blocks(source: Raw) -> Iterator[Raw]:
    for start in range(0, source.size, COPY):
        yield Raw(source.path, source.start + start, min(COPY, source.size - start))


def _checksum(source: Raw, space: Workspace) -> Sum:
    return _sum_of(space.read_bytes("v", source, 0, source.size))


def _sum_of(values: Tensor) -> Sum:
    return Sum(crc.crc32(memory_of(values)), values.nbytes)


def _copy(source: Raw, to: Place, space: Workspace) -> None:
    space.copy(source, to)


def pieces_of(pair: Pair) -> Iterator[Run | Slab]:
    """Cut a pair. Raises `PairError` for shapes that are no pair."""
    groups, axis = pair_axis(pair.g.shape, pair.v.shape, pair.name)
    return pieces.cut(pair.v.shape, axis, groups, _itemsize(pair.v))


def _pieces_of_either(a: Stored | Pair, b: Stored | Pair) -> Iterator[Run | Slab]:
    for side in (a, b):
        if isinstance(side, Pair):
            yield from pieces_of(side)
            return


def _fold(task: Fold, piece: Run | Slab, space: Workspace) -> Sum | None:
    if isinstance(piece, Slab):
        slabs.fold(task, piece, space)
        return None
    w = _folded(task.pair, piece, space, "v")
    space.write(task.to, piece.start, w)
    return _sum_of(w)


def _folded(pair: Pair, run: Run, space: Workspace, role: str) -> Tensor:
    g = space.read("g", pair.g, run.row, g_shape(run.shape, run.axis))
    v = space.read(role, pair.v, run.start, run.shape)
    return weightnorm.fold(g, v, name=pair.name, first=run.row, overwrite=True, scratch=space.scratch)


def _split(task: Split, piece: Run | Slab, space: Workspace) -> SplitPart:
    dtype = torch_dtype(task.weight.dtype)
    sums: tuple[Sum, ...] = ()
    try:
        if isinstance(piece, Slab):
            g = slabs.split(task, piece, space)
        else:
            w = space.read("v", task.weight, piece.start, piece.shape)
            g, v = weightnorm.split(
                w,
                piece.axis,
                name=task.name,
                g_dtype=torch_dtype(task.g_dtype),
                first=piece.row,
                overwrite=True,
                scratch=space.scratch,
            )
            if task.g is not None:
                space.write(task.g, piece.row, g)
            if task.v is not None:
                space.write(task.v, piece.start, v)
                sums = _sum_of(g), _sum_of(v)
    except NotSplittable as problem:
        return SplitPart(weightnorm.RowCounts(0, 0), str(problem))
    return SplitPart(weightnorm.row_counts(g, dtype), None, *sums)


def _comparisons(task: Compare) -> Iterator[Unit]:
    a, b = task.a, task.b
    differs = threading.Event() if task.whether else None
    for size, compare in _comparisons_of(a, b):
        yield size, compare if differs is None else functools.partial(_until_first, differs, compare)


def _until_first(differs: threading.Event, compare: Callable[[Workspace], Result], space: Workspace) -> Result:
    found = None if differs.is_set() else compare(space)
    if found is not None:
        differs.set()
    return found


def _comparisons_of(a: Stored | Pair, b: Stored | Pair) -> Iterator[Unit]:
    if isinstance(a, Stored) and isinstance(b, Stored):
        for start in range(0, a.raw.size, COPY):
            size = min(COPY, a.raw.size - start)
            yield 2 * size, functools.partial(_compare_stored, a, b, start, size)
        return
    for piece in _pieces_of_either(a, b):
        yield 2 * piece.size * _itemsize(_direction(a)), functools.partial(_compare_values, a, b, piece)


def _compare_stored(a: Stored, b: Stored, start: int, size: int, space: Workspace) -> Mismatch | None:
    x = space.read_bytes("v", a.raw, start, size)
    y = space.read_bytes("other", b.raw, start, size)
    dtype = getattr(torch, a.dtype, None)
    return _mismatch(x, y, dtype if isinstance(dtype, torch.dtype) else torch.uint8)


def _compare_values(a: Stored | Pair, b: Stored | Pair, piece: Run | Slab, space: Workspace) -> Mismatch | None:
    found: Mismatch | None = None
    for x, y in zip(_values(a, piece, space, "v"), _values(b, piece, space, "other"), strict=True):
        mismatch = _mismatch(x, y, x.dtype)
        found = _worse(found, mismatch)
    return found


def _values(side: Stored | Pair, piece: Run | Slab, space: Workspace, role: str) -> Iterator[Tensor]:
    """The plain values of a piece of one side, in parts that are the same on both sides."""
    if isinstance(piece, Slab):
        if isinstance(side, Pair):
            parts = slabs.folded(side, piece, space, role)
        else:
            parts = slabs.parts(side, piece, space, role)
        yield from (values for _, values in parts)
    elif isinstance(side, Pair):
        yield _folded(side, piece, space, role)
    else:
        yield space.read(role, side, piece.start, piece.shape)


def mismatch_of(parts: Iterable[Result]) -> Mismatch | None:
    """How two tensors differ, by what the pieces came to."""
    found: Mismatch | None = None
    for part in parts:
        found = _worse(found, part if isinstance(part, Mismatch) else None)
    return found


def whole(sums: Iterable[Sum]) -> Sum:
    """The checksum of stretches that follow one another."""
    return functools.reduce(lambda a, b: Sum(crc.combine(a.crc, b.crc, b.size), a.size + b.size), sums, Sum(0, 0))


def _worse(a: Mismatch | None, b: Mismatch | None) -> Mismatch | None:
    """Two differences as one."""
    if a is None or b is None:
        return a or b
    return Mismatch(a.values + b.values, None if a.ulp is None or b.ulp is None else max(a.ulp, b.ulp))


def _mismatch(a: Tensor, b: Tensor, dtype: torch.dtype) -> Mismatch | None:
    words = torch.int64 if a.nbytes % 8 == 0 else torch.uint8
    flat = [t.reshape(-1).view(torch.uint8) for t in (a, b)]
    if torch.equal(flat[0].view(words), flat[1].view(words)):
        return None
    x, y = (t.view(dtype) for t in flat)
    return Mismatch(bits.differing_bits(x, y), bits.ulp_distance(x, y))


def _direction(side: Stored | Pair) -> Stored:
    return side.v if isinstance(side, Pair) else side


def _itemsize(stored: Stored) -> int:
    return torch_dtype(stored.dtype).itemsize
