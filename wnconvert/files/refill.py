"""Put the converted tensors back into the dicts they came from: same objects, same types, same order."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Hashable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from wnconvert.carriers.state_dict import Slots
from wnconvert.files.entries import Entry
from wnconvert.files.tree import Tree, memory_of

_Items = list[tuple[Any, Any]]


class Maker(Protocol):
    """Makes the tensors that the file did not hold."""

    def new(self, entry: Entry) -> Tensor:
        """The tensor of an entry that was converted."""

    def copy(self, view: Tensor) -> Tensor:
        """A tensor of the file, in a storage of its own."""


class InMemory:
    """Makes them at once."""

    def new(self, entry: Entry) -> Tensor:
        """See `Maker.new`."""
        return entry.load()

    def copy(self, view: Tensor) -> Tensor:
        """See `Maker.copy`."""
        return view.detach().clone()


@contextlib.contextmanager
def refilled(tree: Tree, carrier: Slots, maker: Maker) -> Iterator[None]:
    """For as long as the context lasts, the dicts of a checkpoint hold what its carrier holds now."""
    before = {home: list(holder.items()) for home, holder in tree.holders.items()}
    refill(tree, carrier, maker)
    try:
        yield
    finally:
        for home, holder in tree.holders.items():
            _set_items(holder, before[home])


def refill(tree: Tree, carrier: Slots, maker: Maker | None = None) -> None:
    """Make the dicts of a checkpoint hold what its carrier holds now."""
    value_of = _Values(tree.entries, carrier, maker or InMemory())
    now = {(entry.home, entry.key): slot for entry, slot in zip(tree.entries, carrier.slots(), strict=True)}
    for home, holder in tree.holders.items():
        items: _Items = []
        for key, value in holder.items():
            slot = now.get((home, key)) if isinstance(key, str) else None
            if slot is None:
                items.append((key, value))
            else:
                items += [(entry.key, value_of(entry)) for entry in slot]
        _set_items(holder, items)


def _set_items(holder: dict[Any, Any], items: _Items) -> None:
    # In place: other parts of the file may refer to this very dict, and its type and attributes are its own.
    holder.clear()
    holder.update(items)


class _Values:
    """Gives the tensor of an entry. Names that share a tensor are given the same object."""

    def __init__(self, before: list[Entry], carrier: Slots, maker: Maker) -> None:
        self._maker = maker
        self._made: dict[tuple[Hashable, bool | None], Tensor] = {}
        self._new: dict[Hashable, Tensor] = {}
        self._copies: dict[object, Tensor] = {}
        self._original = {entry.load for entry in before}
        self._torn = _torn_storages(before, list(carrier.entries()))

    def __call__(self, entry: Entry) -> Tensor:
        # Tied names are made of the same.
        key = (entry.made or entry.load, entry.requires_grad)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self._make(entry)
        return made

    def _make(self, entry: Entry) -> Tensor:
        if entry.load not in self._original:
            # Once, also where one name of a tensor is a parameter and another is not.
            source = entry.made or entry.load
            value = self._new.get(source)
            if value is None:
                value = self._new[source] = self._maker.new(entry)
            return value if entry.requires_grad is None else nn.Parameter(value, entry.requires_grad)
        value = entry.load()
        if _storage(value) not in self._torn:
            return value
        memory = memory_of(value)
        if memory not in self._copies:
            self._copies[memory] = self._maker.copy(value)
        copy = self._copies[memory]
        return copy if entry.requires_grad is None else nn.Parameter(copy, entry.requires_grad)


def _torn_storages(before: list[Entry], after: list[Entry]) -> set[int]:
    """Storages that lost a view and have bytes to spare now.

    torch.save writes whole storages. Where biases share one with weights that were folded (an LSTM's flat memory), they
    would keep all of it in the file.
    """
    remaining = {entry.load for entry in after}
    lost = {_storage(entry.load()) for entry in before if entry.load not in remaining}
    needed: dict[int, dict[object, int]] = collections.defaultdict(dict)
    sizes: dict[int, int] = {}
    originals = {entry.load for entry in before}
    for entry in after:
        if entry.load in originals:
            value = entry.load()
            storage = _storage(value)
            if storage in lost:
                needed[storage][memory_of(value)] = value.nbytes
                sizes[storage] = value.untyped_storage().nbytes()
    return {storage for storage, views in needed.items() if sum(views.values()) < sizes[storage]}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
