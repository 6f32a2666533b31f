"""The table of file formats. A new format is one file and one row.

`read` decides by content where it can, so that a file with the wrong suffix is still read for what it is.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from wnconvert.carriers import Carrier
from wnconvert.errors import InputError, UsageError
from wnconvert.files import sniff
from wnconvert.ranks import Ranks
from wnconvert.report.model import MagnitudeStatistics, OutputCheck
from wnconvert.watch import Watcher

if TYPE_CHECKING:
    from wnconvert.stream.receipts import Receipts


@dataclasses.dataclass(frozen=True, slots=True)
class ReadOptions:
    """What a reader may need to know.

    Attributes:
        unsafe_load: unpickle whole modules, which can run code.
        arch: builds the exact module, `package.module:callable`, `timm:NAME` or `transformers`.
        drop_optimizer: leave out optimizer state.
        single_file: take what lies in data files into the ONNX model itself.
    """

    unsafe_load: bool = False
    arch: str | None = None
    drop_optimizer: bool = False
    single_file: bool = False


class Document(Protocol):
    """An open file.

    Attributes:
        format: as shown in reports.
        notes: what a person should know about this file, such as optimizer state that will not match.
        carrier: what holds its weights. Converting changes the carrier, never the file it was read from.
    """

    format: str
    notes: list[str]
    carrier: Carrier

    def magnitudes(self) -> Mapping[str, MagnitudeStatistics]:
        """Statistics of g by site name, for the split sites. Reads only the magnitudes."""

    def save(self, folder: Path, name: str) -> Receipts | None:
        """Write the carrier's present state into `folder`, an empty staging folder, the main file under `name`.

        Anything else that belongs to the result (external data) is written beside it under its final name. A result
        of several files (shards) is a folder of that name.

        Returns:
            What was computed on the way, if anything is known of it.
        """

    def compare_outputs(self, other: Document) -> OutputCheck | None:
        """Run both files on the same random inputs, or None where this format cannot be run."""


@runtime_checkable
class Watched(Protocol):
    """A document whose saving takes long enough to be followed."""

    def watch(self, watcher: Watcher) -> None:
        """Tell `watcher` from now on how far saving is."""


@runtime_checkable
class Shared(Protocol):
    """A document of several files, which several processes can save together. Every one of them calls `save`.

    Finished files are noted in the staging folder, so that a later run can go on from there. See `files.parts`.
    """

    def join(self, crew: Ranks) -> None:
        """Save only the share of this rank from now on; rank 0 also what there is only one of."""


@dataclasses.dataclass(frozen=True, slots=True)
class Format:
    """One row of the table.

    Attributes:
        name: as shown in reports.
        suffixes: of the file names it is usually found under.
        module: has `recognise(path) -> bool`, which reads at most a few kilobytes, and
            `read(path, options) -> Document`.
        folders: it is a folder of several files, and its documents are `Shared`.
        splits_into: names of the formats that `apply` writes instead, because this one cannot carry a pair.
    """

    name: str
    suffixes: tuple[str, ...]
    module: str
    folders: bool = False
    splits_into: tuple[str, ...] = ()


FORMATS: tuple[Format, ...] = (
    Format("safetensors", (".safetensors",), "wnconvert.files.safetensors"),
    Format("safetensors-sharded", (".safetensors.index.json",), "wnconvert.files.sharded", folders=True),
    Format("torch-sharded", (".bin.index.json",), "wnconvert.files.torch_sharded", folders=True),
    Format("dcp", (".distcp",), "wnconvert.files.dcp", folders=True),
    Format("onnx", (".onnx",), "wnconvert.files.onnx"),
    Format(
        "torchscript",
        (".jit", ".torchscript"),
        "wnconvert.files.torchscript",
        splits_into=("safetensors", "torch"),
    ),
    Format("pt2", (".pt2",), "wnconvert.files.pt2"),
    Format("torch", (".pt", ".pth", ".bin", ".ckpt", ".tar"), "wnconvert.files.torch_file"),
)


def read(path: Path, options: ReadOptions = ReadOptions()) -> Document:
    """Open a file of any format in the table.

    Raises:
        InputError: it does not exist, is damaged, or is of no known format.
        UsageError: an option is for another format.
    """
    found = recognise(path)
    if options.single_file and found.name != "onnx":
        raise UsageError(f"{path}: --single-file is for ONNX models, which can have data files")
    document: Document = importlib.import_module(found.module).read(path, options)
    return document


def recognise(path: Path) -> Format:
    """Tell the format of a file, by content where possible.

    Raises:
        InputError: it does not exist, or is of no known format.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_file() and not path.is_dir():
        raise InputError(f"{path}: not a regular file, so it cannot be read more than once")
    for row in FORMATS:
        if (row.folders or path.is_file()) and importlib.import_module(row.module).recognise(path):
            return row
    described = sniff.describe(path)
    if described is not None:
        raise InputError(f"{path} {described}")
    known = ", ".join(suffix for row in FORMATS for suffix in row.suffixes)
    raise InputError(f"{path}: not a model file of a known format ({known})")


def format_of_name(name: str) -> Format | None:
    """Tell the format that a file of this name is expected to have, or None if its suffix says nothing."""
    rows = [(suffix, row) for row in FORMATS for suffix in row.suffixes if name.endswith(suffix)]
    return max(rows, key=lambda found: len(found[0]))[1] if rows else None
