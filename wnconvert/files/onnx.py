"""ONNX files, with or without external data."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import ModelProto

from wnconvert.carriers.onnx import OnnxCarrier
from wnconvert.errors import InputError, UsageError
from wnconvert.files import Document, ReadOptions, onnx_stream
from wnconvert.files.magnitudes import of_tensors
from wnconvert.files.onnx_outputs import compare
from wnconvert.report.model import MagnitudeStatistics, OutputCheck
from wnconvert.stream.receipts import Receipts
from wnconvert.watch import SILENT, Watcher

LIMIT = 2**31 - 1
"""Bytes that a protobuf message can have."""

# Tags of the fields of a ModelProto: field number << 3 | wire type. A writer puts ir_version first.
_IR_VERSION = 0x08
_NEXT_TAGS = frozenset({0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72})


def recognise(path: Path) -> bool:
    """Whether a file is an ONNX model, or is called one and is not an archive or a pickle."""
    with path.open("rb") as file:
        head = file.read(3)
    if len(head) == 3 and head[0] == _IR_VERSION and head[1] < 0x80 and head[2] in _NEXT_TAGS:
        return True
    return path.suffix == ".onnx" and not head.startswith((b"PK", b"\x80"))


def read(path: Path, options: ReadOptions) -> OnnxDocument:
    """Open a model. Its external data is only looked at, not read.

    Raises:
        InputError: the model is damaged, or its data is missing, truncated or outside its folder.
        UsageError: a module is named that says what the layers are.
    """
    if options.arch is not None:
        raise UsageError(f"{path}: --arch is for checkpoints; an ONNX file says itself what its layers are")
    if path.stat().st_size > LIMIT:
        raise InputError(f"{path}: is over 2 GB, the most an ONNX file can have without external data")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{path}: not an ONNX model, or damaged ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if not model.HasField("graph") or not model.ir_version:
        raise InputError(f"{path}: not an ONNX model: it has no graph")
    return OnnxDocument(path, model, single_file=options.single_file)


class OnnxDocument:
    """An open ONNX file.

    Args:
        path: where it was read from.
        model: loaded without its external data.
        single_file: save it without data files.
    """

    format = "onnx"

    def __init__(self, path: Path, model: ModelProto, *, single_file: bool = False) -> None:
        self.path = path
        self._single_file = single_file
        self._watcher = SILENT
        try:
            self.carrier = OnnxCarrier(model, path.parent)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        self.carrier.data_files()
        self.notes: list[str] = []
        if model.functions:
            self.notes.append(f"weights inside its {len(model.functions)} local functions are not looked at")

    def watch(self, watcher: Watcher) -> None:
        """See `Watched.watch`."""
        self._watcher = watcher

    def magnitudes(self) -> Mapping[str, MagnitudeStatistics]:
        """Statistics of g by site name."""
        return of_tensors(self.carrier.magnitudes().items())

    def save(self, folder: Path, name: str) -> Receipts:
        """Write the model into a staging folder inside the folder it will be in.

        Data files are referenced where the result lands in the same folder, and weights that changed go into a new
        file. Elsewhere data files are copied, and weights that changed are written in their place.

        Raises:
            PairError: a pair cannot be multiplied.
            InputError: a file of another model is in the way, or the model does not fit one protobuf message.
        """
        if self._single_file:
            with tempfile.TemporaryDirectory(prefix=".data.", dir=folder) as apart:
                receipts = onnx_stream.write(self.carrier, Path(apart), name, self._watcher)
                _take_in(self.carrier, Path(apart), self.path)
        else:
            receipts = onnx_stream.write(self.carrier, folder, name, self._watcher)
        (folder / name).write_bytes(_serialize(self.carrier.model, self.path))
        return receipts

    def compare_outputs(self, other: Document) -> OutputCheck | None:
        """Run both models in ONNX Runtime, in processes of their own."""
        if not isinstance(other, OnnxDocument):
            return None
        return compare(self.path, self.carrier, other.path, other.carrier)


def _take_in(carrier: OnnxCarrier, folder: Path, path: Path) -> None:
    """Move what lies in the data files of this folder into the model."""
    located = carrier.located(folder)
    if sum(part.length for _, part in located) > LIMIT:
        raise InputError(_TOO_LARGE.format(path))
    for tensor, part in located:
        with part.path.open("rb") as file:
            file.seek(part.offset)
            tensor.raw_data = file.read(part.length)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")


def _serialize(model: ModelProto, path: Path) -> bytes:
    try:
        data: bytes = model.SerializeToString(deterministic=True)
    except (EncodeError, ValueError) as error:
        raise InputError(_TOO_LARGE.format(path)) from error
    if len(data) > LIMIT:
        raise InputError(_TOO_LARGE.format(path))
    return data


_TOO_LARGE = "{}: the result would be over 2 GB, the most an ONNX file can have; leave its weights in data files"
