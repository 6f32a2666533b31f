"""A TorchScript archive as a zip of records: code, a pickle of attributes, and the storages of its tensors.

Reading one runs nothing: neither torch.jit.load nor the classes and functions that the pickle names are used.
"""

from __future__ import annotations

import dataclasses
import functools
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from wnconvert.carriers.torchscript import pickled
from wnconvert.carriers.torchscript.pickled import Call, Global, Storage
from wnconvert.errors import InputError

DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading bytes that are not what they claim to be can raise."""

_ALIGNMENT = 64
_CHUNK = 1 << 24
_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the pickle describes it.

    Attributes:
        storage: where its data is.
        offset, shape, stride: in elements.
        requires_grad: of a parameter that trains.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool

    @classmethod
    def of(cls, value: Any) -> StoredTensor | None:
        """Read a value of the pickle, or return None if it is no dense tensor."""
        if not isinstance(value, Call) or value.function != _REBUILD:
            return None
        storage, offset, shape, stride, requires_grad = value.args[:5]
        if not isinstance(storage, Storage) or storage.kind.name not in _DTYPES:
            return None
        return cls(storage, int(offset), tuple(shape), tuple(stride), bool(requires_grad))

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return _DTYPES[self.storage.kind.name]

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for two names of one tensor."""
        return self.storage.key, self.dtype, self.offset, self.shape, self.stride

    def pickled(self) -> Call:
        """As a value of the pickle."""
        hooks = Call(Global("collections", "OrderedDict"), ())
        return Call(_REBUILD, (self.storage, self.offset, self.shape, self.stride, self.requires_grad, hooks))


Added = Mapping[str, bytes | Callable[[], Tensor]]
"""New records: bytes, or a tensor that is computed when it is written."""


class Archive:
    """An archive in a file or in memory.

    Attributes:
        name: for messages.
        root: the value that its `data.pkl` holds, with no class or function imported.
        constants: the tensors that its code refers to as `CONSTANTS.c0` and so on, and other values.
    """

    def __init__(self, source: Path | bytes, name: str) -> None:
        """Open an archive.

        Raises:
            InputError: it is damaged or too old.
        """
        self.name = name
        self._source = source
        self._checked: set[str] = set()
        try:
            with self._open() as file, zipfile.ZipFile(file) as archive:
                self._infos = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
                self._folder = next(iter(archive.namelist()), "").split("/", 1)[0]
                self._refuse_old(archive)
                self.root = pickled.load(archive.read(self._infos["data.pkl"]))
                self.constants: tuple[Any, ...] = ()
                if "constants.pkl" in self._infos:
                    self.constants = tuple(pickled.load(archive.read(self._infos["constants.pkl"])))
                self.code = {
                    record: archive.read(info)
                    for record, info in self._infos.items()
                    if record.startswith("code/") and record.endswith(".py")
                }
        except DAMAGE as error:
            raise InputError(f"{name}: damaged or cut short: {first_line(error)}") from error

    def _refuse_old(self, archive: zipfile.ZipFile) -> None:
        if "data.pkl" not in self._infos:
            raise InputError(
                f"{self.name}: has code but no data.pkl, as before torch 1.3; load and save it with a newer torch"
            )
        if "byteorder" in self._infos and archive.read(self._infos["byteorder"]).strip() != b"little":
            raise InputError(f"{self.name}: was written on a big-endian machine; load and save it here")

    def records(self) -> list[str]:
        """Names of all records, in order, without the folder that they are in."""
        return list(self._infos)

    def read(self, record: str) -> bytes:
        """The bytes of a record.

        Raises:
            InputError: they are damaged.
        """
        try:
            with self._open() as file, zipfile.ZipFile(file) as archive:
                return archive.read(self._infos[record])
        except DAMAGE as error:
            raise InputError(f"{self.name}: {record} is damaged: {first_line(error)}") from error

    def tensor(self, stored: StoredTensor, folder: str = "data") -> Tensor:
        """View a tensor in the mapped file. Nothing that is done to it reaches the file.

        Raises:
            InputError: its data is missing or shorter than its shape says.
        """
        try:
            flat = self._storage(f"{folder}/{stored.storage.key}", stored.dtype, stored.storage.size)
            return torch.as_strided(flat, stored.shape, stored.stride, stored.offset)
        except DAMAGE as error:
            raise InputError(
                f"{self.name}: record {folder}/{stored.storage.key} is damaged: {first_line(error)}"
            ) from error

    def _storage(self, record: str, dtype: torch.dtype, size: int) -> Tensor:
        if size == 0:
            return torch.empty(0, dtype=dtype)
        info = self._infos[record]
        if info.compress_type == zipfile.ZIP_STORED:
            start = self._data_start(info)
            self._check(info, start)
            if start % dtype.itemsize == 0 and info.file_size >= size * dtype.itemsize:
                return torch.frombuffer(self._mapped, dtype=dtype, count=size, offset=start)
        return torch.frombuffer(bytearray(self.read(record)), dtype=dtype, count=size)

    def _check(self, info: zipfile.ZipInfo, start: int) -> None:
        """Compare a checksum, once for each record, as torch does."""
        if info.filename not in self._checked:
            with memoryview(self._mapped) as whole, whole[start : start + info.file_size] as data:
                found = zlib.crc32(data)
            if found != info.CRC:
                raise zipfile.BadZipFile("its checksum is wrong")
            self._checked.add(info.filename)

    def _data_start(self, info: zipfile.ZipInfo) -> int:
        # The table of contents does not say how long the entry's own header is.
        header = self._mapped[info.header_offset : info.header_offset + 30]
        name, extra = struct.unpack("<HH", header[26:30])
        return int(info.header_offset + 30 + name + extra)

    @functools.cached_property
    def _mapped(self) -> Any:
        if isinstance(self._source, bytes):
            return bytearray(self._source)
        with self._source.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def _open(self) -> IO[bytes]:
        if isinstance(self._source, bytes):
            import io

            return io.BytesIO(self._source)
        return self._source.open("rb")

    def write(self, file: IO[bytes], changed: Mapping[str, bytes | None], added: Added) -> None:
        """Write the archive with some records changed, left out (None) and added; the others byte for byte."""
        with self._open() as source, zipfile.ZipFile(source) as old, zipfile.ZipFile(file, "w") as new:
            for record, info in self._infos.items():
                if record not in changed:
                    self._add(new, record, info.file_size, self._chunks(old, info))
                elif (text := changed[record]) is not None:
                    self._add(new, record, len(text), [text])
            for record, value in added.items():
                content = memoryview(value) if isinstance(value, bytes) else _bytes_of(value())
                self._add(new, record, len(content), [content])

    def _chunks(self, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[bytes]:
        try:
            with archive.open(info) as data:
                while chunk := data.read(_CHUNK):
                    yield chunk
        except DAMAGE as error:
            raise InputError(f"{self.name}: damaged: {first_line(error)}") from error

    def _add(self, archive: zipfile.ZipFile, record: str, size: int, chunks: Iterable[bytes | memoryview]) -> None:
        info = zipfile.ZipInfo(f"{self._folder}/{record}")
        info.file_size = size
        # torch puts data where it can be mapped: behind a header that ends at a multiple of 64.
        header = 30 + len(info.filename.encode()) + 4 + (20 if size >= zipfile.ZIP64_LIMIT else 0)
        padding = -(archive.start_dir + header) % _ALIGNMENT
        info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
        with archive.open(info, "w", force_zip64=size >= zipfile.ZIP64_LIMIT) as target:
            for chunk in chunks:
                target.write(chunk)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
