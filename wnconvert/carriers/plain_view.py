"""The tensors of a checkpoint by their plain names, split or not, and the sites that follow from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping

from wnconvert import names
from wnconvert.files.entries import Entry
from wnconvert.names import Pair
from wnconvert.sites import OVERLAP, SCHEMES, Dim, Site, Use, pair_axis, resolve
from wnconvert.walk.keys import Guess, Weight

_DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True, slots=True)
class PlainView:
    """What a checkpoint holds at one moment.

    Attributes:
        entries: every tensor as it is stored, by its name.
        pairs: the pairs among them, by plain name, also those that cannot be multiplied.
        weights: shape and dtype by plain name, in order; a pair counts as the weight that it stands for.
    """

    entries: Mapping[str, Entry]
    pairs: Mapping[str, Pair]
    weights: Mapping[str, Weight]

    @classmethod
    def of(cls, entries: Iterable[Entry]) -> PlainView:
        """Take the entries of a checkpoint, in order."""
        stored = {entry.name: entry for entry in entries}
        shaped = names.find_pairs({name: entry.shape for name, entry in stored.items()})
        found = [pair if pair.problem else _of_dtypes(pair, stored) for pair in shaped]
        pair_of = {key: pair for pair in found for key in (pair.g, pair.v)}
        weights: dict[str, Weight] = {}
        for name, entry in stored.items():
            pair = pair_of.get(name)
            if pair is None:
                weights[name] = Weight(entry.shape, entry.dtype)
            elif pair.name not in weights:
                of = stored[pair.v if pair.v in stored else pair.g]
                weights[pair.name] = Weight(of.shape, of.dtype)
        return cls(stored, {pair.name: pair for pair in found}, weights)

    def sites(self, guesses: Mapping[str, Guess], dim: Dim) -> list[Site]:
        """Make one site of all names of one weight: everything that a walker knows, and every pair."""
        ties: dict[Hashable, list[str]] = {}
        for name in self.weights:
            ties.setdefault(self._identity(name), []).append(name)
        known = guesses.keys() | self.pairs.keys()
        return [self._site(group, guesses, dim) for group in ties.values() if not known.isdisjoint(group)]

    def _identity(self, name: str) -> Hashable:
        """Equal for two names of one weight, plain or split."""
        pair = self.pairs.get(name)
        if pair is None:
            alias = self.entries[name].alias
            return name if alias is None else ("plain", alias)
        if pair.problem is not None:
            return name
        g, v = self.entries[pair.g].alias, self.entries[pair.v].alias
        return name if g is None or v is None else (pair.scheme, g, v)

    def _site(self, group: list[str], guesses: Mapping[str, Guess], dim: Dim) -> Site:
        first, *tied = group
        known = [guesses[name] for name in group if name in guesses]
        # An embedding that shares its table with a layer follows that layer.
        known = [guess for guess in known if guess.use.kind != "Embedding"] or known
        found = dict.fromkeys(dataclasses.replace(use, root=first) for guess in known for use in guess.uses)
        uses = list(found) or [Use(first, "Unknown", first, 0, 0)]
        shape, dtype = self.weights[first]
        evidence = "; ".join(dict.fromkeys(guess.evidence for guess in known)) or None
        pair = self.pairs.get(first)
        if pair is None:
            site = resolve(uses, shape, dtype, dim=dim, tied=tied, evidence=evidence)
            reason = _unsupported(dtype) or self._obstacle(group)
            return site.skipped(reason) if reason else site
        groups, axis = (1, None) if pair.problem else pair_axis(self.entries[pair.g].shape, shape, first)
        return Site(
            name=first,
            kind=uses[0].kind,
            shape=shape,
            dtype=dtype,
            axis=axis,
            groups=groups,
            state="split",
            scheme=pair.scheme,
            uses=tuple(use.where for use in uses),
            tied=tuple(tied),
            evidence=evidence,
            skip=pair.problem,
        )

    def _obstacle(self, group: list[str]) -> str | None:
        """Why a plain weight cannot be replaced by two tensors."""
        for name in group:
            other = self.entries[name].overlaps
            if other is not None:
                return OVERLAP.format(other)
            if self.entries[name].fixed:
                return f"{name} is held in a list or under a key that is no name, so that g and v cannot be named"
            spelled = (key for scheme in SCHEMES for key in names.spell(name, scheme))
            taken = next((key for key in spelled if key in self.entries), None)
            if taken is not None:
                return f"{taken} is the name of another tensor"
        return None


def _of_dtypes(pair: Pair, entries: Mapping[str, Entry]) -> Pair:
    """A pair of two tensors, with the problem that one of them cannot be multiplied."""
    problems = (_unsupported(entries[key].dtype) for key in (pair.v, pair.g))
    return dataclasses.replace(pair, problem=next(filter(None, problems), None))


def _unsupported(dtype: str) -> str | None:
    return None if dtype in _DTYPES else f"dtype {dtype} has no weight normalization"
