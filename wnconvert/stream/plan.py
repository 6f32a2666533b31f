"""What goes where in the files of a result: data only. Nothing here imports torch."""

from __future__ import annotations

import abc
import dataclasses
from pathlib import Path
from typing import Literal, TypeAlias

from wnconvert.files.box import Box
from wnconvert.files.raw import Inline, Raw, Scattered
from wnconvert.sites import Axis


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """A tensor, contiguous in row-major order or in parts that are, mostly in files.

    Attributes:
        raw: where its bytes are.
        dtype: as in `float32`.
        shape: of the tensor.
    """

    raw: Raw | Inline | Scattered
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """A split weight in files.

    Attributes:
        name: of the plain weight, for errors.
        g: the magnitude.
        v: the direction.
    """

    name: str
    g: Stored
    v: Stored


@dataclasses.dataclass(frozen=True, slots=True)
class Half:
    """One half of a weight that is split while it is written.

    Attributes:
        name: of the plain weight.
        part: which half.
        weight: the plain weight.
        axis: see `weightnorm.split`, as for `groups`.
        groups: above 1, the axis refers to the weight seen in groups.
    """

    name: str
    part: Literal["g", "v"]
    weight: Stored
    axis: Axis
    groups: int


class InFile(abc.ABC):
    """A tensor that may lie in files."""

    __slots__ = ()

    @abc.abstractmethod
    def source(self) -> Stored | Pair | None:
        """Where it lies, or None if it does not."""

    @abc.abstractmethod
    def size(self) -> int:
        """About how much work it is to read it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A position in an output file."""

    path: Path
    start: int


@dataclasses.dataclass(frozen=True, slots=True)
class PartPlace:
    """A position in an output file for a part of a tensor. The rest of it is not written.

    Attributes:
        place: of the first element of the part.
        box: the part.
    """

    place: Place
    box: Box


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """Memory in the place of an output file, of the size of the tensor."""

    data: bytearray


Target: TypeAlias = Place | PartPlace | Kept


@dataclasses.dataclass(frozen=True, slots=True)
class Put:
    """Write these bytes."""

    data: bytes
    to: Place


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """Copy bytes of an input, by the kernel where it can."""

    source: Raw
    to: Place


@dataclasses.dataclass(frozen=True, slots=True)
class Fold:
    """Multiply a pair and write the weight."""

    pair: Pair
    to: Place | PartPlace


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """Split a weight and write both halves.

    Attributes:
        name: of the plain weight.
        weight: the weight.
        axis: see `weightnorm.split`, as for the next two.
        groups: above 1, the axis refers to the weight seen in groups.
        g_dtype: as in `float32`.
        g: where the magnitude goes, or None if it is known.
        v: where the direction goes, or None if only the magnitude is written.
    """

    name: str
    weight: Stored
    axis: Axis
    groups: int
    g_dtype: str
    g: Place | Kept | None
    v: Place | PartPlace | None


@dataclasses.dataclass(frozen=True, slots=True)
class Compare:
    """Compare two tensors of one shape and dtype bit by bit, pairs multiplied.

    Attributes:
        name: of the tensor.
        a: one side.
        b: the other.
        whether: it is enough to know whether they differ, so what follows the first difference is not looked at.
    """

    name: str
    a: Stored | Pair
    b: Stored | Pair
    whether: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Checksum:
    """Find the CRC-32 of a part of a file."""

    source: Raw


Task: TypeAlias = Put | Copy | Fold | Split | Compare | Checksum
