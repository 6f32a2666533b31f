"""Folders of `.bin` shards with an index, recognised without importing torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wnconvert.files import index as indices

if TYPE_CHECKING:
    from wnconvert.files import ReadOptions
    from wnconvert.files.torch_sharded_document import TorchShardedDocument

SUFFIX = ".bin.index.json"


def recognise(path: Path) -> bool:
    """Whether this is an index of such shards, or a folder that holds one."""
    return indices.recognise(path, SUFFIX)


def read(path: Path, options: ReadOptions) -> TorchShardedDocument:
    """Open a folder. See `torch_sharded_document.read`."""
    from wnconvert.files import torch_sharded_document

    return torch_sharded_document.read(path, options)
