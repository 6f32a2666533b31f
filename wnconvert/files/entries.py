"""A checkpoint seen as a flat, ordered list of tensors that are not loaded. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from wnconvert.files.raw import Raw, Scattered
from wnconvert.stream.plan import Half, Pair, Stored

__all__ = ["Entry", "Raw"]

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a checkpoint.

    Attributes:
        name: dotted path, nesting included: `generator.conv_pre.weight`. Unique in the file.
        shape: of the tensor.
        dtype: as in `float32`.
        load: gives the tensor. It may alias the file's memory.
        prefix: the part of `name` that comes from nesting: `generator.`.
        home: which of the file's containers (a dict, a shard) holds it.
        alias: equal for two names of the same tensor; None where the format cannot say so.
        requires_grad: of an `nn.Parameter`; None for a plain tensor.
        raw: where its bytes are, while they are those of the input.
        locate: finds `raw`, in formats where that takes long.
        overlaps: another tensor that holds some of its elements in another form (transposed, a slice), or None.
        made: what its bytes are made of where the engine makes them; None where `load` does.
        fixed: it has no name of its own (an element of a list), so it cannot become two tensors.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Tensor]
    prefix: str = ""
    home: Hashable = None
    alias: Hashable = None
    requires_grad: bool | None = None
    raw: Raw | Scattered | None = None
    locate: Callable[[], Raw | Scattered | None] | None = None
    overlaps: str | None = None
    made: Pair | Half | None = None
    fixed: bool = False

    @property
    def stored(self) -> Stored | None:
        """Where it lies in a file, while it is that of the input."""
        raw = self.locate() if self.locate else self.raw
        return None if raw is None else Stored(raw, self.dtype, self.shape)

    def changed(self, *, made: Pair | Half | None = None, **others: Any) -> Entry:
        """The entry with other values than those of the input."""
        return dataclasses.replace(self, raw=None, locate=None, made=made, **others)

    @property
    def key(self) -> str:
        """The key under which its container holds it."""
        return self.name[len(self.prefix) :]
