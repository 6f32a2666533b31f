"""`.safetensors` files: read by their header, written a block at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wnconvert.carriers.state_dict import StateDictCarrier
from wnconvert.errors import InputError
from wnconvert.files import safetensors_header as header
from wnconvert.files import streamed
from wnconvert.files.entries import Entry, Raw
from wnconvert.files.magnitudes import statistics
from wnconvert.files.mapped import MappedFile
from wnconvert.files.streamed import Output
from wnconvert.walk.arch import walker_for
from wnconvert.watch import SILENT, Watcher

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from wnconvert.files import Document, ReadOptions
    from wnconvert.report.model import MagnitudeStatistics, OutputCheck
    from wnconvert.stream.receipts import Receipts

_DESCRIBED = ("float64", "float32", "float16", "bfloat16")
"""Dtypes whose magnitudes have statistics."""


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
    carrier = StateDictCarrier(entries(mapped, parsed), walker=walker_for(options.arch, path), streamed=True)
    return SafetensorsDocument(carrier, parsed.metadata)


class SafetensorsDocument:
    """One open file. See `Document`."""

    format = "safetensors"

    def __init__(self, carrier: StateDictCarrier, metadata: Mapping[str, str] | None) -> None:
        self.notes: list[str] = []
        self.carrier = carrier
        self._metadata = metadata
        self._watcher = SILENT

    def watch(self, watcher: Watcher) -> None:
        """See `Watched.watch`."""
        self._watcher = watcher

    def magnitudes(self) -> Mapping[str, MagnitudeStatistics]:
        """See `Document.magnitudes`."""
        return magnitudes(self.carrier)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its key."""
        return {entry.name: entry.load() for entry in self.carrier.entries()}

    def save(self, folder: Path, name: str) -> Receipts | None:
        """See `Document.save`."""
        output = Output(folder / name, self._metadata, self.carrier.entries)
        return streamed.write(output, self.carrier, self._watcher).receipts

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
            load=_View(mapped, tensor),
            home=home,
            raw=Raw(mapped.path, tensor.start, tensor.size),
        )


def magnitudes(carrier: StateDictCarrier) -> dict[str, MagnitudeStatistics]:
    """Statistics of every magnitude that still is in a file, read with numpy."""
    found = {}
    for name, entry in carrier.magnitudes().items():
        if isinstance(entry.raw, Raw) and entry.dtype in _DESCRIBED:
            data = MappedFile(entry.raw.path).bytes(entry.raw.start, entry.raw.size)
            described = statistics(_array(data, entry.dtype))
            if described is not None:
                found[name] = described
    return found


def _array(data: bytes, dtype: str) -> NDArray[Any]:
    # Here and not above: a file of plain weights is listed without numpy, which takes longer to import than the rest.
    import ml_dtypes
    import numpy as np

    return np.frombuffer(data, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class _View:
    """Gives a tensor. There are as many as tensors, so it is small."""

    mapped: MappedFile
    tensor: header.Tensor

    def __call__(self) -> Tensor:
        # Here and not above: listing a file must not import torch.
        import torch

        tensor = self.tensor
        dtype = getattr(torch, tensor.dtype, None)
        if isinstance(dtype, torch.dtype):
            return self.mapped.tensor(dtype, tensor.shape, tensor.start, tensor.size)
        # A dtype that torch does not have: its bytes can still be compared.
        return self.mapped.tensor(torch.uint8, (tensor.size,), tensor.start, tensor.size)
