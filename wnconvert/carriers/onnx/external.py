"""Tensors in data files beside the model: where they are, reading one of them, and referring to another place."""

from __future__ import annotations

import dataclasses
import json
import mmap
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from onnx import TensorProto
from torch import Tensor

from wnconvert.carriers.onnx import tensors
from wnconvert.errors import InputError

_REMEMBERED = "wnconvert: the weight is at "


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """The part of a data file that holds one tensor. A location is spelled in one way only."""

    path: Path
    location: str
    offset: int
    length: int


def is_external(tensor: TensorProto) -> bool:
    """Whether the data is in another file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def points_at(tensor: TensorProto, location: str) -> bool:
    """Whether a tensor has its data in this file."""
    entries = {str(entry.key): str(entry.value) for entry in tensor.external_data}
    return is_external(tensor) and str(PurePosixPath(entries.get("location", ""))) == location


def locate(tensor: TensorProto, folder: Path) -> Slice:
    """Find the data of an external tensor, without reading it.

    Raises:
        InputError: the location leaves the folder of the model, the file is missing or too short, or the entry is
            damaged.
    """
    name = tensor.name or "a constant"
    entries = {str(entry.key): str(entry.value) for entry in tensor.external_data}
    location = entries.get("location", "")
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    if not location or posix.is_absolute() or windows.drive or windows.root or ".." in (*posix.parts, *windows.parts):
        raise InputError(f"{folder}: {name} refers to data outside the folder of the model: {location!r}")
    path = folder / location
    try:
        offset, length = int(entries.get("offset", "0")), int(entries.get("length", "-1"))
    except ValueError as error:
        raise InputError(f"{path}: the offset or length of {name} is not a number") from error
    if not path.is_file():
        raise InputError(f"{path}: no such file; it holds the data of {name} and belongs beside the model")
    expected = tensors.itemsize(tensor)
    for n in tensor.dims:
        expected *= n
    # Sub-byte types are packed, so only their given length tells.
    if tensors.torch_name(tensor) is not None and length not in (-1, expected):
        raise InputError(f"{path}: {name} has {expected} bytes but its entry says {length}")
    length = expected if length < 0 else length
    size = path.stat().st_size
    if offset < 0 or offset + length > size:
        raise InputError(
            f"{path}: truncated: {name} needs bytes {offset} to {offset + length}, the file has {size} bytes"
        )
    return Slice(path, str(posix), offset, length)


def is_there(tensor: TensorProto, folder: Path) -> bool:
    """Whether the data of an external tensor can be found."""
    try:
        locate(tensor, folder)
    except InputError:
        return False
    return True


def read(tensor: TensorProto, folder: Path) -> Tensor:
    """Map the data of one external tensor. Writing to the result changes a private copy.

    Raises:
        InputError: see `locate`.
    """
    part = locate(tensor, folder)
    if not part.length:
        return torch.zeros(tuple(tensor.dims), dtype=tensors.FLOATS.get(tensor.data_type, torch.uint8))
    start = part.offset - part.offset % mmap.ALLOCATIONGRANULARITY
    with part.path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), part.offset + part.length - start, access=mmap.ACCESS_COPY, offset=start)
    return tensors.from_bytes(tensor, memoryview(mapped), part.offset - start)


def refer(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Let a tensor have its data in a data file, and nowhere else."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=str(value))


def reference(tensor: TensorProto) -> str:
    """Where the data of an external tensor is, as a line that `recall` reads."""
    return _REMEMBERED + json.dumps([[entry.key, entry.value] for entry in tensor.external_data])


def recall(line: str | bytes, tensor: TensorProto) -> TensorProto | None:
    """The tensor as it was when `reference` made this line, or None if the line is something else."""
    # protobuf gives text that is not UTF-8 back as bytes.
    if not isinstance(line, str) or not line.startswith(_REMEMBERED):
        return None
    made = TensorProto()
    made.CopyFrom(tensor)
    made.ClearField("raw_data")
    made.data_location = TensorProto.EXTERNAL
    del made.external_data[:]
    try:
        for key, value in json.loads(line.removeprefix(_REMEMBERED)):
            made.external_data.add(key=key, value=value)
    except (ValueError, TypeError):
        return None
    return made
