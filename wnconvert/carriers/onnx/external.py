"""Tensors in data files beside the model: where they are, reading one of them, and what a saved model needs."""

from __future__ import annotations

import dataclasses
import filecmp
import json
import mmap
import os
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from onnx import TensorProto
from torch import Tensor

from wnconvert.carriers.onnx import tensors
from wnconvert.errors import InputError

INLINE = 1024
"""Tensors below this many bytes are written into the model itself."""

_REMEMBERED = "wnconvert: the weight is at "

_ALIGNMENT = 4096
"""Tensors start on a page, so that a runtime can map them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """The part of a data file that holds one tensor."""

    path: Path
    location: str
    offset: int
    length: int


def is_external(tensor: TensorProto) -> bool:
    """Whether the data is in another file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


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
    if tensor.data_type in tensors.FLOATS and length not in (-1, expected):
        raise InputError(f"{path}: {name} has {expected} bytes but its entry says {length}")
    length = expected if length < 0 else length
    size = path.stat().st_size
    if offset < 0 or offset + length > size:
        raise InputError(
            f"{path}: truncated: {name} needs bytes {offset} to {offset + length}, the file has {size} bytes"
        )
    return Slice(path, location, offset, length)


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


def stage(locations: Iterable[str], source: Path, folder: Path) -> None:
    """Bring the data files of a model into a staging folder, whose own folder is where the model will be.

    A file that already is where it belongs is linked, so that the staged model can be read; others are copied.

    Raises:
        InputError: another file is in the way.
    """
    for location in sorted(set(locations)):
        origin, final, staged = source / location, folder.parent / location, folder / location
        staged.parent.mkdir(parents=True, exist_ok=True)
        if not final.exists():
            shutil.copyfile(origin, staged)
        elif final.samefile(origin) or filecmp.cmp(final, origin, shallow=False):
            staged.symlink_to(final.resolve())
        else:
            raise InputError(f"{final}: exists and is not the data of this model; write the result to another folder")


class DataFile:
    """A new data file that tensors are appended to, one by one.

    Its name is that of the model with `.data`, and a number where that is taken.
    """

    def __init__(self, folder: Path, model: str) -> None:
        name, count = f"{model}.data", 1
        while (folder.parent / name).exists() or (folder / name).exists():
            count += 1
            name = f"{model}.{count}.data"
        self._path = folder / name

    def put(self, tensor: TensorProto, data: Tensor) -> None:
        """Write `data` to the file, or into the tensor itself if it is small, and let the tensor refer to it."""
        del tensor.external_data[:]
        if data.numel() * data.element_size() < INLINE:
            tensor.ClearField("data_location")
            tensor.raw_data = tensors.to_bytes(data)
            return
        with self._path.open("ab") as file:
            file.seek(0, os.SEEK_END)
            file.write(bytes(-file.tell() % _ALIGNMENT))
            offset = file.tell()
            data.contiguous().flatten().view(torch.uint8).numpy().tofile(file)
        entries = {"location": self._path.name, "offset": offset, "length": data.numel() * data.element_size()}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
