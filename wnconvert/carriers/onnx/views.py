"""The tensors of a model as `compare` and the engine see them: values, and where they lie."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from onnx import TensorProto
from torch import Tensor

from wnconvert import weightnorm
from wnconvert.carriers.onnx import external, tensors
from wnconvert.files.raw import Inline, Raw
from wnconvert.stream import batches
from wnconvert.stream.plan import InFile, Pair, Stored


def read(tensor: TensorProto, folder: Path) -> Tensor:
    """The values of a tensor; those of an external one are mapped.

    Raises:
        InputError: its data is damaged or missing.
    """
    return external.read(tensor, folder) if external.is_external(tensor) else tensors.read_inline(tensor)


def stored(tensor: TensorProto, folder: Path) -> Stored:
    """Where a tensor lies; one without a data file brings its bytes along. Types that torch lacks are bytes.

    Raises:
        InputError: its data is damaged or missing.
    """
    raw: Raw | Inline
    if external.is_external(tensor):
        part = external.locate(tensor, folder)
        raw = Raw(part.path, part.offset, part.length)
    else:
        raw = Inline(tensors.bytes_of_inline(tensor))
    dtype = tensors.torch_name(tensor)
    return Stored(raw, "uint8", (raw.size,)) if dtype is None else Stored(raw, dtype, tuple(tensor.dims))


def _is_for_the_engine(tensor: TensorProto) -> bool:
    """Whether a tensor lies in a data file, or is so small that many of them are best worked on together."""
    return external.is_external(tensor) or math.prod(tensor.dims) <= batches.SMALL


@dataclasses.dataclass(frozen=True, slots=True)
class Plain(InFile):
    """A tensor that is what it is."""

    tensor: TensorProto
    folder: Path

    def source(self) -> Stored | None:
        """See `InFile.source`."""
        return stored(self.tensor, self.folder) if _is_for_the_engine(self.tensor) else None

    def size(self) -> int:
        """See `InFile.size`."""
        return math.prod(self.tensor.dims)

    def __call__(self) -> Tensor:
        return read(self.tensor, self.folder)


@dataclasses.dataclass(frozen=True, slots=True)
class Folded(InFile):
    """A weight that is held as a pair."""

    name: str
    g: TensorProto
    v: TensorProto
    folder: Path

    def source(self) -> Pair | None:
        """See `InFile.source`. The magnitude may be in the model itself."""
        if not _is_for_the_engine(self.v):
            return None
        return Pair(self.name, stored(self.g, self.folder), stored(self.v, self.folder))

    def size(self) -> int:
        """See `InFile.size`."""
        return math.prod(self.v.dims)

    def __call__(self) -> Tensor:
        return weightnorm.fold(read(self.g, self.folder), read(self.v, self.folder), name=self.name)
