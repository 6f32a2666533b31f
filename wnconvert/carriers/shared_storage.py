"""Tensors of a file in which several can share one storage."""

from __future__ import annotations

import collections
from collections.abc import Hashable, Iterable, Sequence

from torch import Tensor

from wnconvert.carriers.state_dict import StateDictCarrier, Walker
from wnconvert.files.entries import Entry
from wnconvert.sites import Scheme, Site


class SharedStorageCarrier(StateDictCarrier):
    """A weight that shares its storage with other tensors goes on doing so as a direction.

    That cannot be known before its values are read, so such a split is not deferred.
    """

    def __init__(
        self, entries: Sequence[Entry], *, others: Sequence[Entry] = (), walker: Walker | None, streamed: bool
    ) -> None:
        """See `StateDictCarrier`."""
        super().__init__(entries, others=others, walker=walker, streamed=streamed)
        self._shared = _shared([*entries, *others]) if streamed else set()

    def defer_split(self, site: Site, scheme: Scheme) -> bool:
        """See `DeferringCarrier.defer_split`."""
        weights = (self._entry(name).load() for name in (site.name, *site.tied))
        return not any(_storage(weight) in self._shared for weight in weights) and super().defer_split(site, scheme)


def _shared(entries: Iterable[Entry]) -> set[int]:
    """Storages that hold more than one tensor."""
    views: dict[int, set[Hashable]] = collections.defaultdict(set)
    partly = set()
    for entry in entries:
        tensor = entry.load()
        views[_storage(tensor)].add((tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()))
        if tensor.nbytes != tensor.untyped_storage().nbytes():
            partly.add(_storage(tensor))
    return partly | {storage for storage, held in views.items() if len(held) > 1}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
