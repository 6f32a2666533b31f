"""Write files of `torch.save` whose storages are copied from their input or computed, never held all at once."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from wnconvert import weightnorm
from wnconvert.carriers.state_dict import Slots
from wnconvert.errors import InputError, NotSplittable
from wnconvert.files import torch_load, torch_skeleton
from wnconvert.files.entries import Entry
from wnconvert.files.filling import Content, Copied, Filling, Held, memory_of
from wnconvert.files.refill import InMemory, refilled
from wnconvert.files.stand_ins import StandIns
from wnconvert.files.torch_map import TorchMap
from wnconvert.files.torch_skeleton import Hole
from wnconvert.files.tree import Tree
from wnconvert.files.written import Outcomes, Written, refused
from wnconvert.sites import RowCounts
from wnconvert.stream.plan import Half
from wnconvert.watch import Watcher

# What pickling raises on objects that cannot be pickled, and torch on a disk that is full.
_UNSAVEABLE = (AttributeError, RecursionError, RuntimeError, TypeError, ValueError, pickle.PicklingError)


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """What to write.

    Attributes:
        roots: what to pickle into each file.
        tree: the dicts among that.
        carrier: what they are to hold. It is told what its deferred splits came to.
        maps: the inputs that are mapped.
    """

    roots: Mapping[Path, object]
    tree: Tree
    carrier: Slots
    maps: Sequence[TorchMap]


def save(job: Job, watcher: Watcher) -> Written:
    """Write some files.

    Which weights can be split shows when their values are read, and what cannot stays as it is. That is rare, so they
    are written as if all could, and once more where one could not.

    Raises:
        InputError: something cannot be pickled, or an input cannot be read.
        PairError: a pair cannot be multiplied.
    """
    settled: Outcomes = {}
    while True:
        # What a module holds is in memory, and dicts beside it may hold the very same tensors.
        filling = None if job.tree.modules else _skeletons(job)
        if filling is None:
            return Written(settled | _save_in_memory(job))
        written = filling.run(watcher)
        for name, outcome in written.outcomes.items():
            job.carrier.settle(name, outcome)
        settled |= written.outcomes
        if not refused(written.outcomes):
            return dataclasses.replace(written, outcomes=settled)


def _skeletons(job: Job) -> Filling | None:
    """Write everything but the bytes of the tensors. None if torch cannot do that for these."""
    stand_ins = StandIns(job.tree.entries)
    filling = Filling()

    def content_of(hole: Hole) -> Content:
        behind = stand_ins.behind(hole.storage)
        if behind is not None:
            source, strides = behind
            return source.made if isinstance(source, Entry) and source.made else Held(source.load, strides)
        found = next(filter(None, (mapped.stored(hole.storage) for mapped in job.maps)), None)
        return memory_of(hole.storage) if found is None else Copied(*found)

    with refilled(job.tree, job.carrier, stand_ins):
        try:
            for path, root in job.roots.items():
                with path.open("w+b") as file:
                    filling.add(path, torch_skeleton.write(file, root), content_of)
        except _UNSAVEABLE:
            # torch leaves no holes for quantized tensors and some other special ones.
            return None
    return filling


def _save_in_memory(job: Job) -> Outcomes:
    settled: Outcomes = {}
    for entry in list(job.carrier.entries()):
        if isinstance(entry.made, Half) and entry.made.part == "g":
            settled[entry.made.name] = _outcome(entry)
            job.carrier.settle(entry.made.name, settled[entry.made.name])
    with refilled(job.tree, job.carrier, InMemory()):
        for path, root in job.roots.items():
            _pickle(path, root)
    return settled


def _outcome(g: Entry) -> RowCounts | str:
    try:
        return weightnorm.row_counts(g.load(), getattr(torch, g.dtype))
    except NotSplittable as problem:
        return str(problem)


def _pickle(path: Path, root: object) -> None:
    try:
        with path.open("wb") as file:
            torch.save(root, file)
    except _UNSAVEABLE as error:
        raise InputError(f"{path.name}: cannot be written: {torch_load.first_line(error)}") from error
