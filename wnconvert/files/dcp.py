"""Folders of torch.distributed.checkpoint, recognised without importing that library, which takes a second."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from wnconvert.errors import InputError

if TYPE_CHECKING:
    from wnconvert.files import ReadOptions
    from wnconvert.files.dcp_document import DcpDocument

_METADATA = ".metadata"
_SUFFIX = ".distcp"


def recognise(path: Path) -> bool:
    """Whether this is such a folder, or a file of one."""
    if path.is_dir():
        return (path / _METADATA).is_file()
    return path.name == _METADATA or path.suffix == _SUFFIX


def read(path: Path, options: ReadOptions) -> DcpDocument:
    """Open a folder. Only its description is read now.

    Raises:
        InputError: the description is damaged or asks for Python objects, or a file is missing or cut short.
    """
    if not path.is_dir():
        raise InputError(f"{path}: one file of a torch.distributed.checkpoint folder; name the folder")
    from wnconvert.files import dcp_document

    return dcp_document.read(path, options)
