"""Work on slabs: some rows of a block that is too large to hold, read once for the norms and once for the values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from wnconvert import norms, weightnorm
from wnconvert.directions import Directions
from wnconvert.stream.pieces import SLAB, Slab
from wnconvert.stream.plan import Fold, Pair, Split, Stored
from wnconvert.stream.workspace import Workspace, torch_dtype


def fold(task: Fold, slab: Slab, space: Workspace) -> None:
    """Write the folded rows of a slab."""
    for at, values in folded(task.pair, slab, space):
        space.write(task.to, at, values)


def folded(pair: Pair, slab: Slab, space: Workspace, role: str = "v") -> Iterator[tuple[int, Tensor]]:
    """Yield the folded rows of a slab, a part at a time, each with the number of its first element in the weight."""
    lengths = _norms(pair.v, slab, space)
    g = space.read(f"g of {role}", pair.g, slab.row, (slab.rows,))
    weightnorm.require_slab(g, lengths, torch_dtype(pair.v.dtype), name=pair.name, first=slab.row)
    for at, values in parts(pair.v, slab, space, role):
        weightnorm.fold_slab(g, values.transpose(0, 1), lengths)
        yield at, values


def split(task: Split, slab: Slab, space: Workspace) -> Tensor:
    """Write the halves of the rows of a slab that are wanted, and return the magnitudes."""
    lengths = _norms(task.weight, slab, space)
    dtype = torch_dtype(task.weight.dtype)
    g, changed = weightnorm.magnitudes(lengths, torch_dtype(task.g_dtype), dtype, slab.row)
    if task.g is not None:
        space.write(task.g, slab.row, g)
    if task.v is not None:
        replaced = Directions(task.name, changed + slab.row, lengths[changed], slab.columns)
        for at, values in parts(task.weight, slab, space, "v"):
            if changed.numel():
                own = values[:, changed].transpose(0, 1)
                start = _column(slab, at)
                values[:, changed] = replaced.of(own.flatten(1), start).view(own.shape).transpose(0, 1)
            space.write(task.v, at, values)
    return g


def _norms(stored: Stored, slab: Slab, space: Workspace) -> Tensor:
    width = max(1, SLAB // slab.rows)

    def read(start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, slab.rows, dtype=torch.float64)
        for column, values in _columns(stored, slab, start, stop, space):
            count = values.shape[0] * values.shape[2]
            target = out[column - start : column - start + count].view(values.shape[0], values.shape[2], slab.rows)
            target.copy_(values.transpose(1, 2))
        return out.t()

    return norms.of_columns(read, slab.columns, torch_dtype(stored.dtype), width=width)


def _columns(stored: Stored, slab: Slab, start: int, stop: int, space: Workspace) -> Iterator[tuple[int, Tensor]]:
    """Yield the columns `start..stop` of a slab as `[before, rows, after]`, each part with its first column."""
    column = start
    while column < stop:
        outer, inner = divmod(column, slab.after)
        whole = (stop - column) // slab.after
        if inner == 0 and whole and slab.rows == slab.block_rows:
            shape, taken = (whole, slab.rows, slab.after), whole * slab.after
            yield column, space.read("columns", stored, _element(slab, outer, 0), shape)
        elif slab.rows == 1:
            taken = min(slab.after - inner, stop - column)
            yield column, space.read("columns", stored, _element(slab, outer, inner), (1, 1, taken))
        else:
            taken = min(slab.after - inner, stop - column)
            values = space.read("columns", stored, _element(slab, outer, 0), (1, slab.rows, slab.after))
            yield column, values[:, :, inner : inner + taken]
        column += taken


def parts(stored: Stored, slab: Slab, space: Workspace, role: str) -> Iterator[tuple[int, Tensor]]:
    """Yield all values of a slab in parts contiguous in the file: `[before, rows, after]` and the first element."""
    if slab.rows == 1 and slab.after > SLAB:
        steps = [(outer, inner) for outer in range(slab.before) for inner in range(0, slab.after, SLAB)]
        for outer, inner in steps:
            at = _element(slab, outer, inner)
            yield at, space.read(role, stored, at, (1, 1, min(SLAB, slab.after - inner)))
        return
    step = max(1, SLAB // (slab.rows * slab.after)) if slab.rows == slab.block_rows else 1
    for outer in range(0, slab.before, step):
        at = _element(slab, outer, 0)
        yield at, space.read(role, stored, at, (min(step, slab.before - outer), slab.rows, slab.after))


def _element(slab: Slab, outer: int, inner: int) -> int:
    """Number of an element of the slab's first row in the weight."""
    return slab.start + (outer * slab.block_rows + slab.offset) * slab.after + inner


def _column(slab: Slab, element: int) -> int:
    """Number of the column of an element of the slab in its row."""
    outer, inner = divmod(element - _element(slab, 0, 0), slab.block_rows * slab.after)
    return outer * slab.after + inner
