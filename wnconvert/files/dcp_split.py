"""Split weights that are stored in parts: magnitudes first, since no file needs to have a whole row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from wnconvert.carriers.state_dict import StateDictCarrier
from wnconvert.files.entries import Entry
from wnconvert.files.raw import Scattered
from wnconvert.ranks import Ranks, shares
from wnconvert.sites import RowCounts
from wnconvert.stream import engine
from wnconvert.stream.plan import Half, Kept, Split
from wnconvert.stream.workspace import torch_dtype
from wnconvert.watch import Watcher

_Found = dict[str, tuple[bytearray, RowCounts | str]]
"""The magnitudes of a weight and what its split came to, by its name."""


def split(carrier: StateDictCarrier, watcher: Watcher, crew: Ranks) -> None:
    """Find the magnitudes of all weights in parts that are to be split, and whether a direction is not the weight.

    Args:
        carrier: holds the magnitudes afterwards.
        watcher: is told how far it is.
        crew: the processes that all call this, and each look at some of the weights.
    """
    waiting = dict(_waiting(carrier))
    if not waiting:
        return
    sizes = {name: half.weight.raw.size for name, (_, half) in waiting.items()}
    mine = [waiting[name] for name in shares(sizes, crew.count)[crew.rank]]
    for found in crew.together(lambda: _find(mine, watcher)):
        for name, (data, outcome) in found.items():
            g, _ = waiting[name]
            carrier.hold(name, torch.frombuffer(data, dtype=torch_dtype(g.dtype)).view(g.shape), outcome)


def _waiting(carrier: StateDictCarrier) -> Iterator[tuple[str, tuple[Entry, Half]]]:
    for entry in carrier.entries():
        half = entry.made
        if isinstance(half, Half) and half.part == "g" and isinstance(half.weight.raw, Scattered):
            yield half.name, (entry, half)


def _find(magnitudes: Sequence[tuple[Entry, Half]], watcher: Watcher) -> _Found:
    kept = {half.name: bytearray(math.prod(g.shape) * torch_dtype(g.dtype).itemsize) for g, half in magnitudes}
    tasks = [
        Split(half.name, half.weight, half.axis, half.groups, g.dtype, Kept(kept[half.name]), None)
        for g, half in magnitudes
    ]
    outcomes = engine.outcomes(tasks, engine.run(tasks, watcher))
    return {name: (data, outcomes[name]) for name, data in kept.items()}
