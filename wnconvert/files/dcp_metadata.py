"""The `.metadata` file of a torch.distributed.checkpoint folder: read without running code, and checked."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Sequence
from enum import Enum, EnumMeta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from wnconvert.errors import InputError
from wnconvert.files.box import Box, overlap
from wnconvert.files.torch_load import DAMAGE, first_line

NAME = ".metadata"

_CLASSES = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "torch": {"Size"},
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
}
"""All that torch writes into it. None of it can run code."""


def _member(cls: object, name: str) -> Enum:
    """One member of an enumeration: Python 3.11.0 to 3.11.3 pickle it as `getattr(cls, name)`."""
    if not isinstance(cls, EnumMeta) or name not in cls.__members__:
        raise _Foreign("builtins.getattr")
    member: Enum = cls[name]
    return member


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Import what a checkpoint's description is made of, and nothing else."""
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name in _CLASSES.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise _Foreign(f"{module}.{name}")


class _Foreign(Exception):
    """The pickle asks for something else."""


def read(folder: Path) -> Metadata:
    """Read and check the description of a checkpoint.

    Raises:
        InputError: it is damaged, asks for Python objects, or does not fit the files beside it.
    """
    path = folder / NAME
    try:
        with path.open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
    except _Foreign as error:
        raise InputError(
            f"{path}: holds a pickled Python object ({error}), which could run code; torch.distributed.checkpoint does "
            "not write such a description"
        ) from error
    except DAMAGE as error:
        raise InputError(f"{path}: damaged or cut short: {first_line(error)}") from error
    try:
        problem = next(_problems(folder, metadata), None)
    except DAMAGE as error:
        raise InputError(f"{path}: damaged: {first_line(error)}") from error
    if problem is not None:
        raise InputError(problem)
    return metadata


def _problems(folder: Path, metadata: Any) -> Iterator[str]:
    path = folder / NAME
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        yield f"{path}: damaged: it describes no checkpoint"
        return
    if not isinstance(metadata.storage_data, dict):
        yield f"{path}: does not say where the tensors are"
        return
    yield from _wrong_files(folder, metadata.storage_data)
    yield from _wrong_tensors(path, metadata)


def _wrong_files(folder: Path, storage: dict[MetadataIndex, _StorageInfo]) -> Iterator[str]:
    needed: dict[str, int] = {}
    for index, info in storage.items():
        name = info.relative_path
        if Path(name).is_absolute() or ".." in Path(name).parts:
            yield f"{folder / NAME}: says that {index.fqn!r} is in {name!r}, which is outside the folder"
        if getattr(info, "transform_descriptors", None):
            yield f"{folder}: {index.fqn!r} is stored compressed or encrypted, which cannot be converted"
        if not _whole((info.offset, info.length)) or info.offset < 0 or info.length < 0:
            yield f"{folder / NAME}: damaged: {index.fqn!r} is at byte {info.offset}, {info.length} bytes long"
        needed[name] = max(needed.get(name, 0), info.offset + info.length)
    for name, size in needed.items():
        file = folder / name
        if not file.is_file():
            yield f"{file}: missing, but {NAME} names it"
        elif file.stat().st_size < size:
            yield f"{file}: cut short: {NAME} says that it has at least {size:,} bytes, it has {file.stat().st_size:,}"


def _wrong_tensors(path: Path, metadata: Metadata) -> Iterator[str]:
    for name, described in metadata.state_dict_metadata.items():
        if not isinstance(described, TensorStorageMetadata):
            if MetadataIndex(name) not in metadata.storage_data:
                yield f"{path}: does not say where {name!r} is"
            continue
        if not isinstance(getattr(described.properties, "dtype", None), torch.dtype):
            yield f"{path}: damaged: does not say the dtype of {name!r}"
        covered, shape = 0, tuple(described.size)
        if not _whole(shape, *((*chunk.offsets, *chunk.sizes) for chunk in described.chunks)):
            yield f"{path}: damaged: {name!r} has a shape or a part that is not made of integers"
        for chunk in described.chunks:
            covered += math.prod(chunk.sizes)
            axes = zip(chunk.offsets, chunk.sizes, shape, strict=True)
            if any(start < 0 or size < 0 or start + size > length for start, size, length in axes):
                yield f"{path}: damaged: a part of {name!r} lies outside it"
            if MetadataIndex(name, chunk.offsets) not in metadata.storage_data:
                yield f"{path}: does not say where the part of {name!r} at {list(chunk.offsets)} is"
        elements = math.prod(shape)
        if covered != elements:
            yield f"{path}: the parts of {name!r} have {covered:,} elements together, it has {elements:,}"
        # As many elements as it has, and none of them twice, are all of them.
        if overlap([Box(shape, tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in described.chunks]):
            yield f"{path}: damaged: two parts of {name!r} overlap"


def _whole(*numbers: Sequence[object]) -> bool:
    return all(isinstance(number, int) for several in numbers for number in several)
