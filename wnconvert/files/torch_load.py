"""Load a file of torch.save without running code from it, and say why where that cannot be done."""

from __future__ import annotations

import argparse
import importlib
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wnconvert.errors import InputError
from wnconvert.files import pickle_scan, sniff

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"

_CORES = ("core", "_core")
"""Where numpy keeps the constructor of its scalars, in old and new versions."""

DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)
"""What torch.load raises on bytes that are not what they claim to be."""

_VERDICT = "WeightsUnpickler error: "


def is_zip(path: Path) -> bool:
    """Whether a file starts like a zip archive, as torch.save writes it since version 1.6."""
    return _starts_with(path, _ZIP)


def is_pickle(path: Path) -> bool:
    """Whether a file starts like a bare pickle, as torch.save wrote it before."""
    return _starts_with(path, _PICKLE)


def load(path: Path, *, unsafe: bool) -> object:
    """Load a file onto the CPU. Tensors of a zip archive are mapped and not read.

    Args:
        path: a file that is a zip archive or a pickle.
        unsafe: unpickle anything, which can run code, if the file holds more than tensors and plain data.

    Raises:
        InputError: it is damaged, is of another kind, holds Python objects and `unsafe` is not set, or needs a class
            that cannot be imported.
    """
    zipped = is_zip(path)
    obstacle = sniff.unreadable_archive(path) if zipped else None
    if obstacle is not None:
        raise InputError(f"{path} {obstacle}")
    try:
        with torch.serialization.safe_globals(plain_data()), warnings.catch_warnings():
            # Deprecated storages and old pickle protocols are the author's affair, not the reader's.
            warnings.simplefilter("ignore")
            return _torch_load(path, zipped, weights_only=True)
    except DAMAGE as error:
        foreign = pickle_scan.foreign_classes(path)
        if not foreign:
            raise InputError(
                f"{path}: damaged, cut short, or not written by torch.save: {first_line(error)}"
            ) from error
    if not unsafe:
        raise InputError(
            f"{path}: this file holds a pickled Python object ({foreign[0]}); loading it can run code: "
            "--unsafe-load loads it"
        )
    return _load_unsafely(path, zipped, foreign)


def _load_unsafely(path: Path, zipped: bool, foreign: list[str]) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _torch_load(path, zipped, weights_only=False)
    except DAMAGE as error:
        missing = next((name for name in foreign if not _can_be_imported(name)), None)
        if missing is None:
            raise InputError(f"{path}: cannot be unpickled: {first_line(error)}") from error
        module = missing.rpartition(".")[0]
        raise InputError(
            f"{path}: needs the class {missing}: run where `import {module}` works, e.g. PYTHONPATH=FOLDER "
            f"({first_line(error)})"
        ) from error


def _torch_load(path: Path, zipped: bool, *, weights_only: bool) -> object:
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=zipped)
    # torch goes by this suffix, not by the contents, unless it is given an open file.
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=weights_only)


def plain_data() -> list[Any]:
    """Classes beyond torch's own list that training scripts put into checkpoints, and that can run no code."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    return [argparse.Namespace, np.dtype, *kinds, *((scalar, f"numpy.{core}.multiarray.scalar") for core in _CORES)]


def _can_be_imported(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except DAMAGE:
        return False


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def first_line(error: BaseException) -> str:
    """What an error of torch says, in one line."""
    lines = str(error).strip().splitlines()
    said = lines[0] if lines else type(error).__name__
    # torch puts advice for its own callers before what went wrong.
    return next((line.rpartition(_VERDICT)[2] for line in lines if _VERDICT in line), said)[:200]
