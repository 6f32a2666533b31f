"""Read a file of `torch.save` without reading its tensors: each is a view of a map of the file, at a known place.

The map is read-only and costs nothing before a value is looked at, however large the file. That asks for storages that
lie in the file as they are, which is so for everything that torch writes on this kind of machine.
"""

from __future__ import annotations

import dataclasses
import io
import struct
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch._weights_only_unpickler import Unpickler

from wnconvert.files import sniff
from wnconvert.files.entries import Raw
from wnconvert.files.file_map import FileMap, NotMappable, Place, Window
from wnconvert.files.torch_load import DAMAGE, plain_data

_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER = struct.Struct("<IHHHHHIIIHH")


@dataclasses.dataclass(frozen=True, slots=True)
class TorchMap:
    """The contents of one file, and where its tensors are.

    Attributes:
        path: the file.
        root: what was saved, its tensors views of the map. Writing to them would crash.
        checksums: CRC-32 of the stored bytes by `(start, size)`, for archives.
    """

    path: Path
    root: object
    checksums: Mapping[tuple[int, int], int]
    file: FileMap

    def raw(self, tensor: Tensor) -> Raw | None:
        """Where the bytes of a tensor are, in its logical order; None if they are not in the file like that."""
        start = self.file.offset(tensor.data_ptr())
        if start is None or not tensor.is_contiguous() or tensor.numel() == 0:
            return None
        return Raw(self.path, start, tensor.nbytes)

    def look(self, tensor: Tensor) -> Tensor:
        """The tensor, which is about to be read. What was read before may be given back to the system."""
        self.file.look(tensor.nbytes)
        return tensor

    def stored(self, storage: torch.UntypedStorage) -> tuple[Raw, int | None] | None:
        """Where a storage is and the CRC-32 of its bytes if the file says it, or None if it is not of this file."""
        start = self.file.offset(storage.data_ptr())
        if start is None:
            return None
        return Raw(self.path, start, storage.nbytes()), self.checksums.get((start, storage.nbytes()))


def load(path: Path) -> TorchMap:
    """Open a zip archive, or a pickle of the old format, of `torch.save`.

    Raises:
        NotMappable: it is something else, or damaged. Nothing was run.
    """
    try:
        with (
            path.open("rb") as file,
            torch.serialization.safe_globals(plain_data()),
            warnings.catch_warnings(),
        ):
            # A map that cannot be written to; deprecated storages; old protocols.
            warnings.simplefilter("ignore")
            mapped = FileMap(path)
            magic = file.read(4)
            file.seek(0)
            if magic == b"PK\x03\x04":
                return TorchMap(path, *_load_zip(file, mapped, 0), mapped)
            return TorchMap(path, _load_legacy(file, mapped), {}, mapped)
    except NotMappable:
        raise
    # Damage shows in whatever way the first wrong byte is read. The reader that loads into memory says it in words.
    except DAMAGE as error:
        raise NotMappable(str(error)) from error


def load_item(mapped: FileMap, start: int, size: int) -> tuple[object, Mapping[tuple[int, int], int]]:
    """Read one archive out of a file that holds many, such as an item of torch.distributed.checkpoint.

    Returns:
        What was saved, and `TorchMap.checksums`.

    Raises:
        NotMappable: it is no archive of torch.save, or damaged.
    """
    with mapped.path.open("rb") as file, io.BufferedReader(Window(file, start, size)) as window:
        try:
            return _load_zip(window, mapped, start)
        except DAMAGE as error:
            raise NotMappable(str(error)) from error


def _load_zip(file: IO[bytes], mapped: FileMap, origin: int) -> tuple[object, dict[tuple[int, int], int]]:
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        if sniff.foreign_archive(records) is not None:
            raise NotMappable("an archive of another program")
        if min(info.header_offset for info in records.values()):
            # The table of contents is that of an archive inside this one, whose own was cut off.
            raise NotMappable("damaged")
        pickled = next(name for name in records if name.endswith("data.pkl"))
        prefix = pickled.removesuffix("data.pkl")
        order = archive.read(f"{prefix}byteorder") if f"{prefix}byteorder" in records else b"little"
        if order.decode() != sys.byteorder:
            raise NotMappable("its bytes are in another order")
        checksums: dict[tuple[int, int], int] = {}

        def place_of(key: str, nbytes: int) -> Place:
            info = records[f"{prefix}data/{key}"]
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != nbytes or info.flag_bits & 1:
                raise NotMappable("a storage is not stored as it is")
            place = Place(origin + data_start(file, info), nbytes)
            checksums[place.start, nbytes] = info.CRC
            return place

        return _unpickle(io.BytesIO(archive.read(pickled)), mapped, place_of), checksums


def data_start(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where the bytes of a record begin."""
    file.seek(info.header_offset)
    header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return int(info.header_offset + _LOCAL_HEADER.size + header[9] + header[10])


def _load_legacy(file: IO[bytes], mapped: FileMap) -> object:
    """The old format: magic number, version, system, the object, the keys of its storages, and these in that order."""
    if _plain(file) != _MAGIC or _plain(file) != _LEGACY_PROTOCOL or _plain(file)["little_endian"] is not True:
        raise NotMappable("not of the old format of torch.save")
    start, sizes = file.tell(), {}

    def without_place(storage_type: Any, key: str, numel: int) -> torch.UntypedStorage:
        sizes[key] = (numel, numel * _element_size(storage_type))
        return torch.empty(sizes[key][1], dtype=torch.uint8, device="meta").untyped_storage()

    # Where storages are is known only after the object, so it is read twice.
    _unpickle_with(file, without_place)
    keys = _plain(file)
    places, position = {}, file.tell()
    for key in keys:
        numel, nbytes = sizes[key]
        file.seek(position)
        if struct.unpack("<q", file.read(8))[0] != numel:
            raise NotMappable("a storage is of another size than the object says")
        places[key] = Place(position + 8, nbytes)
        position += 8 + nbytes
    file.seek(start)
    return _unpickle(file, mapped, lambda key, nbytes: places[key])  # noqa: ARG005


def _plain(file: IO[bytes]) -> Any:
    return Unpickler(file, encoding="utf-8").load()  # type: ignore[no-untyped-call]


def _unpickle(file: IO[bytes], mapped: FileMap, place_of: Callable[[str, int], Place]) -> object:
    made: dict[str, torch.UntypedStorage] = {}

    def storage_of(storage_type: Any, key: str, numel: int) -> torch.UntypedStorage:
        if key not in made:
            made[key] = mapped.slice(place_of(key, numel * _element_size(storage_type)))
        return made[key]

    return _unpickle_with(file, storage_of)


def _unpickle_with(file: IO[bytes], storage_of: Callable[[Any, str, int], torch.UntypedStorage]) -> object:
    """Unpickle what `torch.load(weights_only=True)` would, with storages from elsewhere."""
    made: dict[object, torch.storage.TypedStorage] = {}

    def persistent_load(saved_id: tuple[Any, ...]) -> torch.storage.TypedStorage:
        _, storage_type, key, _, numel, *view = saved_id
        if view and view[0] is not None:
            raise NotMappable("a storage is a view of another")
        if (key, storage_type) not in made:
            made[key, storage_type] = torch.storage.TypedStorage(  # type: ignore[no-untyped-call]
                wrap_storage=storage_of(storage_type, key, numel), dtype=_dtype(storage_type), _internal=True
            )
        return made[key, storage_type]

    unpickler = Unpickler(file, encoding="utf-8")
    unpickler.persistent_load = persistent_load  # type: ignore[method-assign]
    root = unpickler.load()  # type: ignore[no-untyped-call]
    torch._utils._validate_loaded_sparse_tensors()  # type: ignore[no-untyped-call]
    return root


def _dtype(storage_type: Any) -> torch.dtype:
    dtype: torch.dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
    return dtype


def _element_size(storage_type: Any) -> int:
    return _dtype(storage_type).itemsize
