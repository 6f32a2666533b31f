"""Write what a converted ONNX model has in data files, a block at a time."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from onnx import TensorProto

from wnconvert import bits, weightnorm
from wnconvert.carriers.onnx import OnnxCarrier, external, tensors, views
from wnconvert.carriers.onnx.carrier import DeferredFold
from wnconvert.carriers.onnx.external import Slice
from wnconvert.carriers.onnx.pairs import Pair
from wnconvert.errors import InputError, PairError
from wnconvert.files.onnx_data import DataFiles, NewData
from wnconvert.sites import RowCounts, Site, kept_axes, pair_axis
from wnconvert.stream import engine
from wnconvert.stream.fileio import Files
from wnconvert.stream.plan import Compare, Fold, Place, Split, Task
from wnconvert.stream.receipts import Receipts
from wnconvert.stream.workspace import Workspace
from wnconvert.watch import Watcher

INLINE_MAGNITUDES = 32 << 20
"""Bytes of magnitudes, all together, up to which they go into the model itself."""

_PROBED = range(1 << 20, 64 << 20)
"""Bytes of a direction of which one row is looked at before all of it is read."""

Splits = Sequence[tuple[Site, Pair]]
Outcomes = Mapping[str, RowCounts | str]


def write(carrier: OnnxCarrier, folder: Path, name: str, watcher: Watcher) -> Receipts:
    """Write the data files of a model, and let its tensors refer to them.

    Args:
        carrier: what was converted. From now on its model is that of the result.
        folder: a staging folder inside the folder where the result will be.
        name: of the model.
        watcher: is told the bytes gone through.

    Returns:
        What was computed for the data files.

    Raises:
        PairError: a pair cannot be multiplied.
        InputError: an input cannot be read, or another file is in the way.
        OSError: an output cannot be written.
    """
    splits = carrier.deferred_splits()
    data = DataFiles(carrier.folder, folder)
    folds = _trained(carrier, data, watcher)
    located = carrier.located()
    changing = {id(fold.tensor) for fold in folds} | {id(pair.v.tensor) for _, pair in splits}
    # A file that stays has no room for another weight in the place of its direction.
    leaving = {id(fold.tensor) for fold in folds if data.stays(_part(carrier, fold.tensor).location)}
    data.take(
        [part for tensor, part in located if id(tensor) not in leaving],
        [part for tensor, part in located if id(tensor) in changing],
    )
    if os.path.lexists(folder / name):
        # Writing there would go through the link, into the data of the input.
        raise InputError(f"{folder.parent / name}: is a data file of the model; choose another name")
    new = NewData(folder, name)
    tasks: list[Task] = [Fold(fold.pair, _room(_part(carrier, fold.tensor), fold.tensor, data, new)) for fold in folds]
    magnitudes = _magnitudes(carrier, splits, new)
    new.create()
    all_tasks = [*magnitudes, *tasks, *data.copies()]
    receipts = Receipts(all_tasks)
    results = engine.run(all_tasks, watcher)
    outcomes = engine.outcomes(all_tasks, results)
    _write_directions(carrier, splits, magnitudes, outcomes, data=data, new=new)
    carrier.settle(outcomes)
    new.finish()
    renamed = data.finish(name)
    for tensor, part in located:
        if part.location in renamed and external.points_at(tensor, part.location):
            external.refer(tensor, renamed[part.location], part.offset, part.length)
    return receipts.taken(results)


def _trained(carrier: OnnxCarrier, data: DataFiles, watcher: Watcher) -> list[DeferredFold]:
    """The folds whose weight no file holds yet. What holds that of another is referred to."""
    guesses: list[tuple[DeferredFold, TensorProto]] = []
    for fold in carrier.deferred_folds():
        held = [] if fold.original is None else [fold.original]
        if data.stays(_part(carrier, fold.tensor).location):
            held.append(fold.tensor)
        guesses += [(fold, tensor) for tensor in held if not _a_row_differs(carrier, fold, tensor)]
    comparisons = [
        Compare(fold.pair.name, fold.pair, views.stored(tensor, carrier.folder), whether=True)
        for fold, tensor in guesses
    ]
    differing = engine.run(comparisons, watcher) if comparisons else {}
    held_by: dict[int, TensorProto] = {}
    for i, (fold, tensor) in enumerate(guesses):
        if i not in differing:
            held_by.setdefault(id(fold.tensor), tensor)
    for fold in carrier.deferred_folds():
        holder = held_by.get(id(fold.tensor), fold.tensor)
        if holder is not fold.tensor:
            fold.tensor.CopyFrom(holder)
    return [fold for fold in carrier.deferred_folds() if id(fold.tensor) not in held_by]


def _a_row_differs(carrier: OnnxCarrier, fold: DeferredFold, other: TensorProto) -> bool:
    """Whether a look at a single row shows already that a tensor is not the weight."""
    halves = fold.pair
    groups, axis = pair_axis(halves.g.shape, halves.v.shape, halves.name)
    if halves.v.raw.size not in _PROBED or axis is None:
        return False
    with Files() as files:
        g = Workspace(files).read("g", halves.g, 0, halves.g.shape)
    v, held = (views.read(tensor, carrier.folder) for tensor in (fold.tensor, other))
    if groups > 1:
        v, held = (values.view(groups, -1, *values.shape[1:]) for values in (v, held))
    for i in kept_axes(axis, v.dim()):
        g, v, held = (values.narrow(i, v.shape[i] // 2, 1) for values in (g, v, held))
    try:
        return not bits.same(weightnorm.fold(g, v), held)
    except PairError:
        # Reading all of it finds that again, and tells which row it is.
        return False


def _room(part: Slice, tensor: TensorProto, data: DataFiles, new: NewData) -> Place:
    """Where other values of a tensor go: to where they were, in a file that is copied, or to the new file."""
    place = data.place(part)
    if place is None:
        return new.place(tensor, part.length)
    data.leave_out(part)
    return place


def _magnitudes(carrier: OnnxCarrier, splits: Splits, new: NewData) -> list[Split]:
    """Find the magnitudes only: mostly a direction is the weight itself, where it is."""
    sizes = [tensors.itemsize(pair.g.tensor) * math.prod(site.g_shape) for site, pair in splits]
    inline = sum(sizes) <= INLINE_MAGNITUDES
    tasks = []
    for (site, pair), size in zip(splits, sizes, strict=True):
        g, weight = pair.g.tensor, views.stored(pair.v.tensor, carrier.folder)
        place = new.place(g, size, inline=inline)
        tasks.append(Split(site.name, weight, site.axis, site.groups, tensors.dtype_name(g), place, None))
    return tasks


def _write_directions(
    carrier: OnnxCarrier,
    splits: Splits,
    magnitudes: Sequence[Split],
    outcomes: Outcomes,
    *,
    data: DataFiles,
    new: NewData,
) -> None:
    """Write the directions that are not the weights: those with rows of zeros, or scaled ones."""
    tasks = []
    for (site, pair), task in zip(splits, magnitudes, strict=True):
        outcome, v = outcomes[site.name], pair.v.tensor
        if isinstance(outcome, str) or outcome == RowCounts(0, 0):
            continue
        place = data.place(_part(carrier, v))
        if place is None:
            if pair.result.node is not None:
                # The original data stays where it is, and fold finds the way back to it.
                pair.result.node.doc_string = external.reference(v)
            place = new.place(v, task.weight.raw.size)
        tasks.append(dataclasses.replace(task, v=place))
    new.create()
    engine.run(tasks)


def _part(carrier: OnnxCarrier, tensor: TensorProto) -> Slice:
    return external.locate(tensor, carrier.folder)
