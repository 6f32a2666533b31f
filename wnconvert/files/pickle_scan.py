"""Look into a pickle without running it: which classes and functions would loading it import?"""

from __future__ import annotations

import itertools
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_HARMLESS = (
    "collections",
    "torch",
    "torch._tensor",
    "torch._utils",
    "torch.nn.parameter",
    "torch.serialization",
    "torch.storage",
)
"""Modules whose classes hold tensors and plain data. What a person wants to be told of comes from elsewhere."""

_DAMAGE = (
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,  # encrypted, or compressed in a way that this Python does not know
    StopIteration,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)

_MOST_OPCODES = 5_000_000


def foreign_classes(path: Path) -> list[str]:
    """List the dotted names that a torch file would import, beyond those that hold tensors and plain data.

    Returns:
        Names in the order of their first appearance; empty if the file holds none or is too damaged to tell.
    """
    try:
        with _pickle_stream(path) as stream:
            found = list(dict.fromkeys(_globals(stream)))
    except _DAMAGE:
        return []
    return [f"{module}.{name}" for module, name in found if module not in _HARMLESS]


def _pickle_stream(path: Path) -> IO[bytes]:
    if not zipfile.is_zipfile(path):
        return path.open("rb")
    archive = zipfile.ZipFile(path)
    return archive.open(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _globals(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    # A file of the old format is several pickles in a row: magic number, protocol, system, the object, its storages.
    for _ in range(4):
        position = stream.tell()
        if not stream.read(1):
            return
        stream.seek(position)
        yield from _globals_of_one(stream)


def _globals_of_one(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    strings: list[str] = []
    memo: dict[int, str] = {}
    for opcode, argument, _ in itertools.islice(pickletools.genops(stream), _MOST_OPCODES):
        if opcode.name in {"GLOBAL", "INST"}:
            module, _, name = str(argument).partition(" ")
            yield module, name
        elif opcode.name == "STACK_GLOBAL":
            if len(strings) >= 2:
                yield strings[-2], strings[-1]
        elif isinstance(argument, str):
            strings.append(argument)
        elif opcode.name == "MEMOIZE" and strings:
            memo[len(memo)] = strings[-1]
        elif opcode.name in ("BINGET", "LONG_BINGET", "GET") and isinstance(argument, int) and argument in memo:
            strings.append(memo[argument])
