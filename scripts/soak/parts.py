"""Folders of torch.distributed.checkpoint as several processes write them: a part of a tensor in each file."""

from __future__ import annotations

import math
import pickle
import random
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


def at_random(tensor: Tensor, rng: random.Random) -> list[Part]:
    """Cut up to four times, each time one of the parts, in any order. They are no grid, and some have no element."""
    found: list[Part] = [([0] * tensor.dim(), list(tensor.shape))]
    for _ in range(rng.randint(0, 4)):
        offsets, sizes = found.pop(rng.randrange(len(found)))
        axis = rng.randrange(tensor.dim())
        first = rng.randint(0, sizes[axis])
        for offset, size in ((0, first), (first, sizes[axis] - first)):
            found.append(
                (
                    [*offsets[:axis], offsets[axis] + offset, *offsets[axis + 1 :]],
                    [*sizes[:axis], size, *sizes[axis + 1 :]],
                )
            )
    rng.shuffle(found)
    return one_at_each_place(found)


def one_at_each_place(parts: Sequence[Part]) -> list[Part]:
    """Leave out empty parts that begin where another one does: a part is known by its offsets."""
    found: dict[tuple[int, ...], Part] = {}
    for offsets, sizes in parts:
        place = tuple(offsets)
        if place not in found or not math.prod(found[place][1]):
            found[place] = offsets, sizes
    return list(found.values())
