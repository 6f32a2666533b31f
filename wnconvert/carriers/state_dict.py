"""The tensors of a checkpoint, with no model code: an ordered list of entries in, an ordered list of entries out.

Nothing is computed or read until a tensor is asked for, and nothing here imports torch before that.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, Protocol

from wnconvert import names
from wnconvert.carriers.plain_view import PlainView
from wnconvert.files.entries import Entry
from wnconvert.sites import Dim, RowCounts, Scheme, Site
from wnconvert.stream.plan import Half, InFile, Pair, Stored
from wnconvert.walk import keys
from wnconvert.walk.keys import Guess, Weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor


_SPLITTABLE = ("float64", "float32", "float16", "bfloat16")
_PARTS: tuple[Literal["g", "v"], ...] = ("g", "v")


class Walker(Protocol):
    """Tells the layer of each weight of a checkpoint.

    Attributes:
        name: see `Carrier.walker`.
        note: see `Carrier.walker_note`. Known once `find` has run.
    """

    name: str
    note: str | None

    def find(self, weights: Mapping[str, Weight]) -> Mapping[str, Guess]:
        """Guess at every weight, by plain name. What it leaves out is not a layer's weight."""


class KeyWalker:
    """Goes by the names and shapes alone."""

    name = "keys"
    note: str | None = None

    def find(self, weights: Mapping[str, Weight]) -> Mapping[str, Guess]:
        """See `wnconvert.walk.keys.find`."""
        return keys.find(weights)


class Slots(Protocol):
    """What whoever writes a file needs to know of a carrier, or of the part of it that goes into that file."""

    def entries(self) -> Iterator[Entry]:
        """See `StateDictCarrier.entries`."""

    def slots(self) -> list[list[Entry]]:
        """See `StateDictCarrier.slots`."""

    def settle(self, name: str, outcome: RowCounts | str) -> None:
        """See `StateDictCarrier.settle`."""


class StateDictCarrier:
    """Entries of a checkpoint. A pair stands where its weight stood, a weight where the first of its pair stood."""

    def __init__(
        self,
        entries: Iterable[Entry],
        *,
        others: Iterable[Entry] = (),
        walker: Walker | None = None,
        streamed: bool = False,
    ) -> None:
        """Take the entries of a file.

        Args:
            entries: the tensors of its networks, in order, under unique names.
            others: tensors that are no weights (optimizer state): kept, and compared by `verify`.
            walker: tells the layers; goes by the keys if None.
            streamed: whoever saves the entries makes halves and folds from where they lie.
        """
        self._streamed = streamed
        self._deferred: dict[str, list[tuple[Entry, str]]] = {}
        self._outcomes: dict[str, RowCounts | str] = {}
        self._walker = walker or KeyWalker()
        self.walker, self.walker_note = self._walker.name, self._walker.note
        # What stood at each position of the input, and what stands there now.
        self._slots: list[list[Entry]] = [[entry] for entry in entries]
        self._slot_of = {slot[0].name: i for i, slot in enumerate(self._slots)}
        self._others = list(others)
        self._read: tuple[str, Tensor] | None = None

    def entries(self) -> Iterator[Entry]:
        """Every tensor as it stands now, in order."""
        for slot in self._slots:
            yield from slot

    def slots(self) -> list[list[Entry]]:
        """For each entry of the input, in its order, what stands there now."""
        return self._slots

    def portions(self, counts: Iterable[int]) -> list[Portion]:
        """The carrier in parts, each of so many entries of the input, in their order."""
        ends = list(itertools.accumulate(counts))
        return [Portion(self, start, stop) for start, stop in zip([0, *ends], ends, strict=False)]

    def sites(self, dim: Dim) -> list[Site]:
        """See `Carrier.sites`."""
        view = PlainView.of(self.entries())
        guesses = self._walker.find(view.weights)
        self.walker, self.walker_note = self._walker.name, self._walker.note
        return view.sites(guesses, dim)

    def read_weight(self, site: Site) -> Tensor:
        """See `Carrier.read_weight`."""
        weight = self._entry(site.name).load()
        self._read = (site.name, weight)
        return weight

    def read_pair(self, site: Site) -> tuple[Tensor, Tensor]:
        """See `Carrier.read_pair`."""
        halves = self._halves(site.name, site)
        return halves.g.load(), halves.v.load()

    def magnitudes(self) -> dict[str, Entry]:
        """The entry that holds g of every pair, by plain name."""
        view = PlainView.of(self.entries())
        return {name: view.entries[pair.g] for name, pair in view.pairs.items() if pair.problem is None}

    def g_dtype(self, site: Site) -> torch.dtype | None:  # noqa: ARG002
        """None: a checkpoint stores g as the module does that will load it."""
        return None

    def defer_split(self, site: Site, scheme: Scheme) -> bool:
        """See `DeferringCarrier.defer_split`."""
        olds = [self._entry(name) for name in (site.name, *site.tied)]
        if not self._streamed or site.dtype not in _SPLITTABLE or any(old.stored is None for old in olds):
            return False
        self._deferred[site.name] = [(old, names.spell(old.name, scheme)[0]) for old in olds]
        split = _Split(olds[0].load, site)
        for old in olds:
            stored = old.stored
            if stored is None:
                continue
            halves = []
            for part, key in zip(_PARTS, names.spell(old.name, scheme), strict=True):
                made = Half(site.name, part, stored, site.axis, site.groups)
                shape = site.g_shape if part == "g" else old.shape
                load = functools.partial(split, part)
                alias = old.alias and (part, old.alias)
                halves.append(old.changed(name=key, shape=shape, load=load, alias=alias, made=made))
            self._replace(old.name, halves)
        return True

    def settle(self, name: str, outcome: RowCounts | str) -> None:
        """Say what a deferred split came to. A reason instead of counts takes it back.

        Args:
            name: of the site.
            outcome: rows that were changed, or why the weight cannot be split.
        """
        if name in self._outcomes:
            return
        self._outcomes[name] = outcome
        if not isinstance(outcome, str):
            return
        for old, g in self._deferred[name]:
            position = self._slot_of[g]
            for entry in self._slots[position]:
                self._slot_of.pop(entry.name)
            self._slots[position] = [old]
            self._slot_of[old.name] = position

    def outcomes(self) -> Mapping[str, RowCounts | str]:
        """See `DeferringCarrier.outcomes`."""
        return self._outcomes

    def hold(self, name: str, g: Tensor, outcome: RowCounts | str) -> None:
        """As `settle`, for a split whose magnitudes are known. Without changed rows, the direction is the weight."""
        self.settle(name, outcome)
        if isinstance(outcome, str):
            return
        for old, g_name in self._deferred[name]:
            magnitude, direction = self._slots[self._slot_of[g_name]]
            self._replace(g_name, [magnitude.changed(load=_holding(g))])
            if outcome == RowCounts(0, 0):
                self._replace(direction.name, [dataclasses.replace(old, name=direction.name)])

    def put_pair(self, site: Site, g: Tensor, v: Tensor, scheme: Scheme) -> None:
        """See `Carrier.put_pair`."""
        unchanged = self._read is not None and self._read[0] == site.name and _same_memory(self._read[1], v)
        self._read = None
        load_g, load_v = _holding(g), _holding(v)
        for name in (site.name, *site.tied):
            old = self._entry(name)
            g_name, v_name = names.spell(name, scheme)
            g_alias, v_alias = (old.alias and (part, old.alias) for part in _PARTS)
            magnitude = old.changed(name=g_name, shape=tuple(g.shape), load=load_g, alias=g_alias)
            if unchanged:
                direction = dataclasses.replace(old, name=v_name)
            else:
                direction = old.changed(name=v_name, load=load_v, alias=v_alias)
            self._replace(name, [magnitude, direction])

    def defer_fold(self, site: Site) -> bool:
        """See `DeferringCarrier.defer_fold`."""
        if not self._streamed:
            return False
        # What is tied is tied afterwards: it has one function that gives it.
        weight = self._halves(site.name, site)
        for name in (site.name, *site.tied):
            halves = self._halves(name, site)
            self._join(name, halves, weight, halves.source())
        return True

    def put_weight(self, site: Site, weight: Callable[[], Tensor]) -> None:
        """See `Carrier.put_weight`. The weight is computed when it is read or saved."""
        for name in (site.name, *site.tied):
            self._join(name, self._halves(name, site), weight)

    def rename(self, site: Site, scheme: Scheme) -> None:
        """See `Carrier.rename`."""
        for name in (site.name, *site.tied):
            before = names.spell(name, site.scheme or "legacy")
            for old, new in zip(before, names.spell(name, scheme), strict=True):
                self._replace(old, [dataclasses.replace(self._entry(old), name=new)])

    def effective(self) -> Mapping[str, Callable[[], Tensor]]:
        """See `Carrier.effective`."""
        view = PlainView.of(self.entries())
        found: dict[str, Callable[[], Tensor]] = {entry.name: _Plain(entry) for entry in self._others}
        halves = set()
        for pair in view.pairs.values():
            if pair.problem is None:
                halves |= {pair.g, pair.v}
                found[pair.name] = _Fold(pair.name, view.entries[pair.g], view.entries[pair.v])
        return found | {name: _Plain(entry) for name, entry in view.entries.items() if name not in halves}

    def _halves(self, name: str, site: Site) -> _Fold:
        g, v = (self._entry(key) for key in names.spell(name, site.scheme or "legacy"))
        return _Fold(site.name, g, v)

    def _join(self, name: str, halves: _Fold, load: Callable[[], Tensor], made: Pair | None = None) -> None:
        """Put a weight in the place of a pair."""
        g, v = halves.g, halves.v
        alias = v.alias and ("w", v.alias)
        folded = v.changed(name=name, load=load, alias=alias, made=made)
        first, second = g, v
        # In another container than v, g cannot stand for the weight: the bulk of the data stays where it was.
        if g.home != v.home or self._position(v) < self._position(g):
            first, second = v, g
        self._replace(first.name, [folded])
        self._replace(second.name, [])

    def _entry(self, name: str) -> Entry:
        return next(entry for entry in self._slots[self._slot_of[name]] if entry.name == name)

    def _position(self, entry: Entry) -> tuple[int, int]:
        slot = self._slot_of[entry.name]
        return slot, self._slots[slot].index(entry)

    def _replace(self, name: str, new: list[Entry]) -> None:
        position = self._slot_of.pop(name)
        slot = self._slots[position]
        at = next(i for i, entry in enumerate(slot) if entry.name == name)
        slot[at : at + 1] = new
        for entry in new:
            self._slot_of[entry.name] = position


@dataclasses.dataclass(frozen=True, slots=True)
class Portion:
    """The entries of a carrier that lie in one file. See `Slots`."""

    _carrier: StateDictCarrier
    _start: int
    _stop: int

    def entries(self) -> Iterator[Entry]:
        """See `Slots.entries`."""
        for slot in self.slots():
            yield from slot

    def slots(self) -> list[list[Entry]]:
        """See `Slots.slots`."""
        return self._carrier.slots()[self._start : self._stop]

    def settle(self, name: str, outcome: RowCounts | str) -> None:
        """See `Slots.settle`."""
        self._carrier.settle(name, outcome)


@dataclasses.dataclass(frozen=True, slots=True)
class _Fold(InFile):
    name: str
    g: Entry
    v: Entry

    def source(self) -> Pair | None:
        """See `InFile.source`."""
        g, v = self.g.stored, self.v.stored
        return None if g is None or v is None else Pair(self.name, g, v)

    def size(self) -> int:
        """See `InFile.size`."""
        return _size(self.v)

    def __call__(self) -> Tensor:
        # Here and not above: listing a checkpoint must not import torch.
        from wnconvert import weightnorm

        return weightnorm.fold(self.g.load(), self.v.load(), name=self.name)


@dataclasses.dataclass(frozen=True, slots=True)
class _Plain(InFile):
    entry: Entry

    def source(self) -> Stored | None:
        """See `InFile.source`."""
        return self.entry.stored

    def size(self) -> int:
        """See `InFile.size`."""
        return _size(self.entry)

    def __call__(self) -> Tensor:
        return self.entry.load()


@dataclasses.dataclass(frozen=True, slots=True)
class _Split:
    weight: Callable[[], Tensor]
    site: Site

    def __call__(self, part: str) -> Tensor:
        from wnconvert import weightnorm

        g, v = weightnorm.split(self.weight(), self.site.axis, groups=self.site.groups, name=self.site.name)
        return g if part == "g" else v


def _size(entry: Entry) -> int:
    # Elements do, where the bytes are not known without torch: this is for dealing out work.
    return entry.raw.size if entry.raw else math.prod(entry.shape)


def _holding(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
