"""The header of a safetensors file: which tensors it holds, where. Nothing here imports torch.

Layout: 8 bytes with the length of the header (little endian), the header (JSON, padded with spaces), the data.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from wnconvert.errors import InputError

_MAX_HEADER = 100_000_000
"""What the safetensors library itself accepts."""

_CODE = re.compile("[A-Z][A-Z0-9_]*")
_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
_CODES = {name: code for code, name in _NAMES.items()}
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """Where one tensor is. `start` counts from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: the tensors in the order of their data, and the metadata as it was written."""

    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, str] | None


def looks_like(path: Path) -> bool:
    """Whether the first bytes are those of a safetensors header."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:9] == b"{" and 2 <= struct.unpack("<Q", start[:8])[0] <= _MAX_HEADER


def read(path: Path) -> Header:
    """Parse the header of a file, and check it against the length of the file.

    Raises:
        InputError: it is damaged; the message says where.
    """
    available = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, available - 8):
            raise _damaged(path, f"its header claims {length} bytes" if length else "it has no header")
        text = file.read(length)
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(table, dict):
        raise _damaged(path, "its header is no JSON object")
    metadata = table.pop("__metadata__", None)
    if metadata is not None and not _is_text(metadata):
        raise _damaged(path, "its metadata is no table of text")
    begin = 8 + length
    # Most shapes are those of other tensors too, and headers of 100,000 tensors are held in memory.
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
    tensors = sorted((_tensor(path, name, fields, begin, shapes) for name, fields in table.items()), key=_order)
    _check_layout(path, tensors, begin, available)
    return Header(tuple(tensors), metadata)


def render(tensors: Iterable[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str] | None) -> bytes:
    """Write the length and the header of a file.

    Args:
        tensors: name, dtype (as in `float32`), shape and size in bytes of each, in the order of their data.
        metadata: kept as it is, or left out if None.
    """
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, dtype, shape, size in tensors:
        table[name] = {
            "dtype": _CODES.get(dtype, dtype),
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def size_in_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor of this dtype (as in `float32`) takes."""
    return math.prod(shape) * _BITS[_CODES.get(dtype, dtype)] // 8


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is there twice")
    for text in (*table, *table.values()):
        if isinstance(text, str):
            # A lone surrogate is valid in JSON text but cannot be written back.
            text.encode("utf-8")
    return table


def _is_text(metadata: object) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _tensor(
    path: Path, name: str, fields: object, begin: int, shapes: dict[tuple[int, ...], tuple[int, ...]]
) -> Tensor:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{name!r} has no dtype, shape and data_offsets")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    # A dtype that is newer than this table is fine, as its bytes are only copied.
    if (
        not isinstance(code, str)
        or not _CODE.fullmatch(code)
        or not _are_sizes(shape)
        or not _are_sizes(offsets)
        or len(offsets) != 2
    ):
        raise _damaged(path, f"{name!r} has a dtype, shape or data_offsets that make no sense")
    start, stop = offsets
    if stop < start or (code in _BITS and math.prod(shape) * _BITS[code] != (stop - start) * 8):
        raise _damaged(path, f"{name!r} of shape {shape} and dtype {code} does not fill its {stop - start} bytes")
    held = tuple(shape)
    return Tensor(name, _NAMES.get(code, code), shapes.setdefault(held, held), begin + start, stop - start)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _order(tensor: Tensor) -> tuple[int, int]:
    return tensor.start, tensor.size


def _check_layout(path: Path, tensors: Iterable[Tensor], begin: int, available: int) -> None:
    position = begin
    for tensor in tensors:
        if tensor.start != position:
            what = "overlaps the tensor before it" if tensor.start < position else "leaves a gap before it"
            raise _damaged(path, f"{tensor.name!r} {what}")
        position += tensor.size
    if position != available:
        raise _damaged(path, f"it has {available} bytes where its header needs {position}")


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: damaged or cut short: {what}")
