"""`.safetensors` files: read by their header, written tensor by tensor."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

import ml_dtypes
import numpy as np

from wnconvert.carriers.state_dict import StateDictCarrier
from wnconvert.errors import InputError
from wnconvert.files import safetensors_header as header
from wnconvert.files.entries import Entry, Raw
from wnconvert.files.magnitudes import statistics
from wnconvert.files.mapped import MappedFile
from wnconvert.walk.arch import walker_for

if TYPE_CHECKING:
    from torch import Tensor

    from wnconvert.files import Document, ReadOptions
    from wnconvert.report.model import MagnitudeStatistics, OutputCheck

_CHUNK = 8 << 20
_NUMPY = {name: np.dtype(name) for name in ("float64", "float32", "float16")} | {
    "bfloat16": np.dtype(ml_dtypes.bfloat16)
}


def recognise(path: Path) -> bool:
    """Whether the file starts like a safetensors header."""
    return header.looks_like(path)


def read(path: Path, options: ReadOptions) -> SafetensorsDocument:
    """Open a file. Only its header is read now.

    Raises:
        InputError: the file is damaged.
    """
    parsed = header.read(path)
    if not parsed.tensors:
        raise InputError(f"{path}: holds no tensors")
    mapped = MappedFile(path)
    carrier = StateDictCarrier(entries(mapped, parsed), walker=walker_for(options.arch, path))
    return SafetensorsDocument(carrier, parsed.metadata, mapped)


class SafetensorsDocument:
    """One open file. See `Document`."""

    format = "safetensors"

    def __init__(self, carrier: StateDictCarrier, metadata: Mapping[str, str] | None, mapped: MappedFile) -> None:
        self.notes: list[str] = []
        self.carrier = carrier
        self._metadata = metadata
        self._mapped = mapped

    def magnitudes(self) -> Mapping[str, MagnitudeStatistics]:
        """See `Document.magnitudes`."""
        return magnitudes(self.carrier)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its key."""
        return {entry.name: entry.load() for entry in self.carrier.entries()}

    def save(self, folder: Path, name: str) -> None:
        """See `Document.save`."""
        write(folder / name, list(self.carrier.entries()), self._metadata, [self._mapped])

    def compare_outputs(self, other: Document) -> OutputCheck | None:  # noqa: ARG002
        """None: a checkpoint cannot be run."""
        return None


def entries(mapped: MappedFile, parsed: header.Header, home: str | None = None) -> Iterator[Entry]:
    """Yield the tensors of one file, in the order of their data."""
    for tensor in parsed.tensors:
        yield Entry(
            tensor.name,
            tensor.shape,
            tensor.dtype,
            load=functools.partial(_load, mapped, tensor),
            home=home,
            raw=Raw(mapped.path, tensor.start, tensor.size),
        )


def write(path: Path, entries: list[Entry], metadata: Mapping[str, str] | None, sources: Iterable[MappedFile]) -> None:
    """Write a file. Tensors that did not change are copied byte by byte, the others computed one at a time.

    Args:
        path: to write.
        entries: the tensors, in order.
        metadata: goes into the header.
        sources: what the tensors are computed from; their memory is given back after each.
    """
    rows = [(entry.name, entry.dtype, entry.shape, stored_size(entry)) for entry in entries]
    with path.open("wb") as file:
        file.write(header.render(rows, metadata))
        for entry in entries:
            if entry.raw:
                _copy(entry.raw, file)
                continue
            file.write(_bytes_of(entry.load()))
            for source in sources:
                source.release()


def stored_size(entry: Entry) -> int:
    """Bytes that a tensor takes in the file."""
    return entry.raw.size if entry.raw else header.size_in_bytes(entry.dtype, entry.shape)


def magnitudes(carrier: StateDictCarrier) -> dict[str, MagnitudeStatistics]:
    """Statistics of every magnitude that still is in a file, read with numpy."""
    found = {}
    for name, entry in carrier.magnitudes().items():
        dtype = _NUMPY.get(entry.dtype)
        if entry.raw is not None and dtype is not None:
            data = MappedFile(entry.raw.path).bytes(entry.raw.start, entry.raw.size)
            described = statistics(np.frombuffer(data, dtype))
            if described is not None:
                found[name] = described
    return found


def _load(mapped: MappedFile, tensor: header.Tensor) -> Tensor:
    # Here and not above: listing a file must not import torch.
    import torch

    dtype = getattr(torch, tensor.dtype, None)
    if isinstance(dtype, torch.dtype):
        return mapped.tensor(dtype, tensor.shape, tensor.start, tensor.size)
    # A dtype that torch does not have: its bytes can still be compared.
    return mapped.tensor(torch.uint8, (tensor.size,), tensor.start, tensor.size)


def _copy(raw: Raw, file: IO[bytes]) -> None:
    left = raw.size
    with raw.path.open("rb") as source:
        source.seek(raw.start)
        while left:
            chunk = source.read(min(left, _CHUNK))
            if not chunk:
                raise InputError(f"{raw.path}: became shorter while it was read")
            file.write(chunk)
            left -= len(chunk)


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
