"""Tensors that stand for ones still to be computed: an address, a shape and strides, and no memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from wnconvert import names
from wnconvert.files.entries import Entry

_PIECE = 1 << 30
_APART = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """A tensor of the input that is to have a storage of its own."""

    view: Tensor

    def load(self) -> Tensor:
        """The tensor."""
        return self.view


StandsFor = Entry | Copy


class StandIns:
    """Makes them, and knows what each stands for. See `refill.Maker`."""

    def __init__(self, before: Iterable[Entry]) -> None:
        """Take the entries of the input, whose memory format those that come from them keep."""
        self._before = {entry.name: entry for entry in before}
        self._for: dict[int, tuple[StandsFor, tuple[int, ...]]] = {}
        # Never looked at, so it takes no memory. Its parts are told apart by their address.
        self._piece = torch.empty(0, dtype=torch.uint8).untyped_storage()
        self._used = 0

    def new(self, entry: Entry) -> Tensor:
        """A tensor in place of a converted entry."""
        dtype = getattr(torch, entry.dtype)
        strides = self._like(entry).stride()
        storage = self._storage(math.prod(entry.shape) * dtype.itemsize)
        self._for[storage.data_ptr()] = entry, strides
        return torch.empty(0, dtype=dtype).set_(storage, 0, entry.shape, strides)

    def copy(self, view: Tensor) -> Tensor:
        """A tensor in place of a copy."""
        like = torch.empty_like(view, device="meta")
        storage = self._storage(view.nbytes)
        self._for[storage.data_ptr()] = Copy(view), like.stride()
        return torch.empty(0, dtype=view.dtype).set_(storage, 0, like.shape, like.stride())

    def behind(self, storage: torch.UntypedStorage) -> tuple[StandsFor, tuple[int, ...]] | None:
        """What a storage stands for, and its strides; None if it is no stand-in."""
        return self._for.get(storage.data_ptr())

    def _like(self, entry: Entry) -> Tensor:
        """A tensor without data, laid out as `weightnorm` lays the result out: like the weight it comes from."""
        source = next((self._before[name] for name in names.sources(entry.name) if name in self._before), None)
        if source is None or source.shape != entry.shape:
            return torch.empty(entry.shape, device="meta")
        return torch.empty_like(source.load(), device="meta")

    def _storage(self, size: int) -> torch.UntypedStorage:
        if self._used + size > self._piece.nbytes():
            self._piece, self._used = torch.empty(max(size, _PIECE), dtype=torch.uint8).untyped_storage(), 0
        part: torch.UntypedStorage = self._piece[self._used : self._used + size]
        self._used += max(size, _APART)
        return part
