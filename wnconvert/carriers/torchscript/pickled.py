"""The pickle in a TorchScript archive, read and written without importing or calling anything that it names.

Only the opcodes that torch's own pickler writes are written, in its order: its unpickler knows no others.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import struct
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """A class or function by its name. Calling it makes a `Call` and imports nothing."""

    module: str
    name: str

    @property
    def qualified(self) -> str:
        """With the module before it."""
        return f"{self.module}.{self.name}"

    def __call__(self, *args: Any) -> Call:
        return Call(self, args)


@dataclasses.dataclass(slots=True, eq=False)
class Call:
    """A function and what it was given, such as the rebuilding of a tensor."""

    function: Global
    args: tuple[Any, ...]


class Instance:
    """An object of a class that the archive defines. `state` is a dict of its attributes, or what it gave instead."""

    cls: Global

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.args, self.state = (), state

    def __deepcopy__(self, memo: dict[int, Any]) -> Instance:
        twin = memo[id(self)] = type(self)(*copy.deepcopy(self.args, memo))
        twin.state = copy.deepcopy(self.state, memo)
        return twin

    @property
    def attributes(self) -> dict[str, Any]:
        """Its attributes by name; none for an object with a state of its own."""
        return self.state if isinstance(self.state, dict) else {}


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """The data behind a tensor: what stands in the archive for the storage of a tensor.

    Attributes:
        kind: class of the storage, which tells the dtype.
        key: name of its record.
        location: device.
        size: number of elements.
    """

    kind: Global
    key: str
    location: str
    size: int


def load(data: bytes) -> Any:
    """Read a pickle.

    Raises:
        pickle.UnpicklingError: and whatever else damaged bytes make Python's unpickler raise.
    """
    return _Unpickler(io.BytesIO(data)).load()


def dump(value: Any) -> bytes:
    """Write a pickle that torch reads."""
    return _Pickler().dump(value)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._known: dict[tuple[str, str], Any] = {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        key = (module_name, global_name)
        if key not in self._known:
            found = Global(*key)
            is_class = module_name.partition(".")[0] == "__torch__"
            self._known[key] = type("Instance", (Instance,), {"cls": found}) if is_class else found
        return self._known[key]

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], Global):
            raise pickle.UnpicklingError("a reference to something that is no storage")
        return Storage(pid[1], str(pid[2]), str(pid[3]), int(pid[4]))


class _Pickler:
    """Shared objects stay shared; a memo is made as torch makes it, after an object is complete."""

    def __init__(self) -> None:
        self._out = bytearray(b"\x80\x02")
        self._memo: dict[Any, int] = {}
        # Objects whose identity is a key of the memo must not be freed while it is used.
        self._kept: list[Any] = []

    def dump(self, value: Any) -> bytes:
        self._save(value)
        return bytes(self._out + b".")

    def _save(self, value: Any) -> None:
        if value is None or isinstance(value, (bool, int, float)):
            self._out += _number(value)
        elif isinstance(value, str):
            text = value.encode("utf-8", "surrogatepass")
            self._once(("text", value), [b"X" + struct.pack("<I", len(text)) + text])
        elif isinstance(value, Global):
            self._once(value, [f"c{value.module}\n{value.name}\n".encode()])
        elif isinstance(value, type) and issubclass(value, Instance):
            self._save(value.cls)
        elif isinstance(value, Storage):
            self._write([("storage", value.kind, value.key, value.location, value.size), b"Q"])
        elif isinstance(value, tuple):
            self._write([b")"] if not value else [b"(", *value, b"t"])
        else:
            self._once(id(value), list(self._shared(value)), value)

    def _shared(self, value: Any) -> Iterator[Any]:
        """The parts of an object that may stand in several places."""
        if isinstance(value, list):
            yield from (b"](", *value, b"e")
        elif isinstance(value, dict):
            yield from (b"}(", *(part for item in value.items() for part in item), b"u")
        elif isinstance(value, Call):
            yield from (value.function, value.args, b"R")
        elif isinstance(value, Instance) and value.state is None:
            yield from (value.cls, value.args, b"R")
        elif isinstance(value, Instance):
            yield from (value.cls, b")\x81", *self._state(value.state), b"b")
        else:
            raise TypeError(f"a TorchScript archive holds no {type(value).__name__}")

    def _state(self, state: Any) -> Iterator[Any]:
        if not isinstance(state, dict):
            yield state
            return
        # torch's unpickler reads a number for a memo before the object is built as one for its class.
        yield b"}("
        for item in state.items():
            yield from item
        yield b"u"

    def _write(self, parts: list[Any]) -> None:
        for part in parts:
            if isinstance(part, bytes):
                self._out += part
            else:
                self._save(part)

    def _once(self, key: Any, parts: list[Any], keep: Any = None) -> None:
        if key in self._memo:
            index = self._memo[key]
            self._out += b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index)
            return
        self._write(parts)
        index = self._memo[key] = len(self._memo)
        self._kept.append(keep)
        self._out += b"q" + bytes([index]) if index < 256 else b"r" + struct.pack("<I", index)


def _number(value: bool | float | None) -> bytes:
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if 0 <= value < 1 << 8:
        return b"K" + struct.pack("<B", value)
    if 0 <= value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data
