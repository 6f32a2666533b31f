"""Folders of torch.distributed.checkpoint as several processes write them: a part of a tensor in each file."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Part = tuple[Sequence[int], Sequence[int]]
"""Offsets and sizes. Together, the parts of a tensor have each element once."""


def write(folder: Path, tensors: Mapping[str, Tensor], cut: Callable[[Tensor], Sequence[Part]]) -> None:
    """Write the first part of each tensor into the first file, and so on, under names that begin with `model.`."""
    described, stored, paths = {}, {}, {}
    ends: dict[str, int] = {}
    for key, tensor in tensors.items():
        name, chunks = f"model.{key}", []
        for i, (offsets, sizes) in enumerate(cut(tensor)):
            part = tensor
            for axis, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                part = part.narrow(axis, offset, size)
            file = f"__{i}_0.distcp"
            start = ends.get(file, 0)
            with (folder / file).open("ab") as writer:
                torch.save(part.clone(memory_format=torch.contiguous_format), writer)
                ends[file] = writer.tell()
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            stored[MetadataIndex(name, torch.Size(offsets), i)] = _StorageInfo(file, start, ends[file] - start)
        described[name] = TensorStorageMetadata(TensorProperties.create_from_tensor(tensor), tensor.shape, chunks)
        paths[name] = ("model", key)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(described, paths, stored)))


def along(tensor: Tensor, count: int, axis: int) -> list[Part]:
    """Cut along one axis, as torch does for `Shard(axis)`. The last parts may have no element."""
    axis = min(axis, tensor.dim() - 1)
    length = tensor.shape[axis]
    step = -(-length // count)
    found: list[Part] = []
    for i in range(count):
        first = min(i * step, length)
        offsets, sizes = [0] * tensor.dim(), list(tensor.shape)
        offsets[axis], sizes[axis] = first, min(step, length - first)
        found.append((offsets, sizes))
    return found
