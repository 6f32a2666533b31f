"""Random inputs of the shapes that an ONNX model declares. Nothing here imports a runtime."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZES = (32, 64, 8, 128, 2, 1, 256, 512, 576, 224, 16, 3, 4, 288)
"""Tried for dimensions that a model leaves open: multiples for strided networks first, then small, then windows."""

MAX_SUBSETS = 6
"""Open dimensions up to which every subset of them is tried at each size, the rest being 1."""

NUMPY = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
    "string": np.str_,
}
"""Element types by the name ONNX Runtime gives them."""

Dims = Sequence[int | str | None]


class Unsupported(Exception):
    """An input for which no value can be made up."""


def element_type(declared: str) -> tuple[type[np.generic], bool]:
    """Read a type such as `tensor(float)` or `seq(tensor(float))`: `(numpy type, whether it is a sequence)`.

    Raises:
        Unsupported: any other type.
    """
    sequence = declared.startswith("seq(")
    name = declared.removeprefix("seq(").removeprefix("tensor(").rstrip(")")
    if name not in NUMPY or "tensor(" not in declared:
        raise Unsupported(f"no input of type {declared} can be made")
    return NUMPY[name], sequence


def open_dims(shapes: Sequence[Dims]) -> list[str]:
    """The dimensions that a model leaves open, once each: by their own name, or by where they stand."""
    return list(dict.fromkeys(key for i, dims in enumerate(shapes) for key in _keys(i, dims)))


def assignments(names: Sequence[str]) -> Iterator[dict[str, int]]:
    """Sizes for the open dimensions, the likeliest first.

    Of each shape the first open dimension mostly is a batch, so all others vary first.
    """
    if not names:
        yield {}
        return
    later = names[1:] if len(names) > 1 else names
    for size in SIZES:
        yield {name: size if name in later else 1 for name in names}
    for size in SIZES:
        yield dict.fromkeys(names, size)
    if len(names) > MAX_SUBSETS:
        return
    for size in SIZES:
        for count in range(1, len(names)):
            for chosen in itertools.combinations(names, count):
                yield {name: size if name in chosen else 1 for name in names}


def resolve(index: int, dims: Dims, sizes: dict[str, int]) -> tuple[int, ...]:
    """The shape of one input under an assignment."""
    return tuple(d if isinstance(d, int) and d >= 0 else sizes[_key(index, axis, d)] for axis, d in enumerate(dims))


def make(rng: np.random.Generator, kind: type[np.generic], shape: tuple[int, ...], scalar: int) -> NDArray[Any]:
    """One random input.

    Integers are 0 or 1: valid as a mask, a token, a position or a type of token. A single integer, which may be a
    length, a rate or a choice, is `scalar`.
    """
    if issubclass(kind, np.floating):
        return rng.standard_normal(shape).astype(kind)
    if kind is np.str_:
        return np.full(shape, "a")
    if kind is not np.bool_ and np.prod(shape) == 1:
        return np.full(shape, np.int64(scalar).astype(kind))
    return rng.integers(0, 2, shape).astype(kind)


def _keys(index: int, dims: Dims) -> list[str]:
    return [_key(index, axis, d) for axis, d in enumerate(dims) if not (isinstance(d, int) and d >= 0)]


def _key(index: int, axis: int, dim: int | str | None) -> str:
    # Some exporters name every open dimension "?", which means nothing.
    return dim if isinstance(dim, str) and dim.strip("?") else f"{index}.{axis}"
