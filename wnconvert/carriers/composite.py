"""Several networks in one file, each under its own prefix, seen as one carrier."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING

from wnconvert.carriers import Carrier
from wnconvert.files.tree import memory_of
from wnconvert.sites import OPT_IN, Dim, Scheme, Site

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class CompositeCarrier:
    """Passes every request on to the carrier that a name belongs to."""

    def __init__(self, parts: Mapping[str, Carrier]) -> None:
        """Take carriers by prefix (`model.`, or `` for names that are whole already)."""
        self._parts = parts
        self._members: dict[str, list[tuple[Carrier, Site]]] = {}
        self.walker, self.walker_note = self._describe()

    def sites(self, dim: Dim) -> list[Site]:
        """See `Carrier.sites`. A weight that several networks share is one site, named as the first of them has it."""
        found: dict[Hashable, Site] = {}
        members: dict[Hashable, list[tuple[Carrier, Site]]] = {}
        for prefix, part in self._parts.items():
            for own in part.sites(dim):
                named = _renamed(own, prefix.__add__)
                key = _identity(part, own) or (prefix, own.name)
                members.setdefault(key, []).append((part, own))
                found[key] = _merged(found[key], named) if key in found else named
        self._members = {site.name: members[key] for key, site in found.items()}
        self.walker, self.walker_note = self._describe()
        return list(found.values())

    def read_weight(self, site: Site) -> Tensor:
        """See `Carrier.read_weight`."""
        part, own = self._members[site.name][0]
        return part.read_weight(own)

    def read_pair(self, site: Site) -> tuple[Tensor, Tensor]:
        """See `Carrier.read_pair`."""
        part, own = self._members[site.name][0]
        return part.read_pair(own)

    def g_dtype(self, site: Site) -> torch.dtype | None:
        """See `Carrier.g_dtype`."""
        part, own = self._members[site.name][0]
        return part.g_dtype(own)

    def put_pair(self, site: Site, g: Tensor, v: Tensor, scheme: Scheme) -> None:
        """See `Carrier.put_pair`."""
        for part, own in self._members[site.name]:
            part.put_pair(_as_decided(own, site), g, v, scheme)

    def put_weight(self, site: Site, weight: Callable[[], Tensor]) -> None:
        """See `Carrier.put_weight`."""
        once = functools.cache(weight)
        for part, own in self._members[site.name]:
            part.put_weight(own, once)

    def rename(self, site: Site, scheme: Scheme) -> None:
        """See `Carrier.rename`."""
        for part, own in self._members[site.name]:
            part.rename(own, scheme)

    def effective(self) -> Mapping[str, Callable[[], Tensor]]:
        """See `Carrier.effective`."""
        return {prefix + name: load for prefix, part in self._parts.items() for name, load in part.effective().items()}

    def _describe(self) -> tuple[str, str | None]:
        walkers = dict.fromkeys(part.walker for part in self._parts.values())
        notes = dict.fromkeys(part.walker_note for part in self._parts.values() if part.walker_note)
        return "+".join(walkers), "; ".join(notes) or None


def _renamed(site: Site, rename: Callable[[str], str]) -> Site:
    return dataclasses.replace(site, name=rename(site.name), tied=tuple(rename(name) for name in site.tied))


def _identity(part: Carrier, site: Site) -> Hashable:
    """The same for two sites that hold the same memory; None for one that cannot be told."""
    if site.skip and site.state == "split":
        return None
    held = part.read_pair(site) if site.state == "split" else (part.read_weight(site),)
    if any(tensor.is_meta for tensor in held):
        return None
    memory = tuple(memory_of(tensor) for tensor in held)
    return None if None in memory else memory


def _merged(first: Site, other: Site) -> Site:
    merged = dataclasses.replace(first, uses=(*first.uses, *other.uses), tied=(*first.tied, other.name, *other.tied))
    if other.skip:
        return merged.skipped(other.skip)
    known = other.kind not in OPT_IN and first.kind not in OPT_IN
    if known and first.state == "plain" and (first.axis, first.groups) != (other.axis, other.groups):
        reason = f"{first.name} needs axis {first.axis}, {other.name} needs axis {other.axis}"
        return merged.skipped(f"its uses disagree on the axis: {reason}")
    return merged


def _as_decided(own: Site, site: Site) -> Site:
    """A site of one network, split as all of its networks are."""
    return dataclasses.replace(own, kind=site.kind, axis=site.axis, groups=site.groups)
