"""Several networks in one file, each under its own prefix, seen as one carrier."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from wnconvert.carriers import Carrier
from wnconvert.sites import Dim, Scheme, Site

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class CompositeCarrier:
    """Passes every request on to the carrier that a name belongs to."""

    def __init__(self, parts: Mapping[str, Carrier]) -> None:
        """Take carriers by prefix (`model.`, or `` for names that are whole already)."""
        self._parts = parts
        self._owner: dict[str, str] = {}
        self.walker, self.walker_note = self._describe()

    def sites(self, dim: Dim) -> list[Site]:
        """See `Carrier.sites`."""
        found = []
        for prefix, part in self._parts.items():
            for site in part.sites(dim):
                named = _renamed(site, prefix.__add__)
                self._owner[named.name] = prefix
                found.append(named)
        self.walker, self.walker_note = self._describe()
        return found

    def read_weight(self, site: Site) -> Tensor:
        """See `Carrier.read_weight`."""
        part, own = self._part(site)
        return part.read_weight(own)

    def read_pair(self, site: Site) -> tuple[Tensor, Tensor]:
        """See `Carrier.read_pair`."""
        part, own = self._part(site)
        return part.read_pair(own)

    def g_dtype(self, site: Site) -> torch.dtype | None:
        """See `Carrier.g_dtype`."""
        part, own = self._part(site)
        return part.g_dtype(own)

    def put_pair(self, site: Site, g: Tensor, v: Tensor, scheme: Scheme) -> None:
        """See `Carrier.put_pair`."""
        part, own = self._part(site)
        part.put_pair(own, g, v, scheme)

    def put_weight(self, site: Site, weight: Callable[[], Tensor]) -> None:
        """See `Carrier.put_weight`."""
        part, own = self._part(site)
        part.put_weight(own, weight)

    def rename(self, site: Site, scheme: Scheme) -> None:
        """See `Carrier.rename`."""
        part, own = self._part(site)
        part.rename(own, scheme)

    def effective(self) -> Mapping[str, Callable[[], Tensor]]:
        """See `Carrier.effective`."""
        return {prefix + name: load for prefix, part in self._parts.items() for name, load in part.effective().items()}

    def _part(self, site: Site) -> tuple[Carrier, Site]:
        prefix = self._owner[site.name]
        return self._parts[prefix], _renamed(site, lambda name: name.removeprefix(prefix))

    def _describe(self) -> tuple[str, str | None]:
        walkers = dict.fromkeys(part.walker for part in self._parts.values())
        notes = dict.fromkeys(part.walker_note for part in self._parts.values() if part.walker_note)
        return "+".join(walkers), "; ".join(notes) or None


def _renamed(site: Site, rename: Callable[[str], str]) -> Site:
    return dataclasses.replace(site, name=rename(site.name), tied=tuple(rename(name) for name in site.tied))
