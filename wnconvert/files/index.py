"""An index of shards, as transformers writes it for safetensors and for torch's format, and the folder around it."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wnconvert.errors import InputError, UsageError
from wnconvert.files.entries import Entry


def recognise(path: Path, suffix: str) -> bool:
    """Whether this is an index, or a folder that holds one."""
    return path.name.endswith(suffix) if path.is_file() else any(path.glob(f"*{suffix}"))


def find(path: Path, suffix: str) -> Path:
    """The index that a path is, or that a folder holds.

    Raises:
        InputError: the folder holds several.
    """
    if path.is_file():
        return path
    found = sorted(path.glob(f"*{suffix}"))
    if len(found) > 1:
        raise InputError(f"{path}: holds {len(found)} indices; name one of them, such as {found[0].name}")
    return found[0]


def parse(path: Path) -> dict[str, Any]:
    """Read an index: a dict with a `weight_map` from names to files.

    Raises:
        InputError: it is no such thing.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        # A lone surrogate is valid in JSON text but cannot be written back.
        json.dumps(index, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged: no JSON: {str(error).splitlines()[0]}") from error
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(shard, str) for shard in table.values()):
        raise InputError(f"{path}: damaged: it has no weight_map from names to files")
    return dict(index)


def shard(index: Path, name: str) -> Path:
    """A file that an index names.

    Raises:
        InputError: it is missing, or outside the folder of the index.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{index}: names the shard {name!r}, which is outside its folder")
    path = index.parent / name
    if not path.is_file():
        raise InputError(f"{path}: missing, but {index.name} names it")
    return path


def check_agreement(index: Path, weight_map: Mapping[str, str], held_by: Mapping[str, Sequence[str]]) -> None:
    """Check that each name is where the index says.

    Args:
        index: the index.
        weight_map: what it says.
        held_by: the names in each shard.

    Raises:
        InputError: they disagree.
    """
    held: dict[str, str] = {}
    for shard_name, names in held_by.items():
        for name in names:
            if name in held:
                raise InputError(f"{index}: {name!r} is in both {held[name]} and {shard_name}")
            held[name] = shard_name
    for name, shard_name in weight_map.items():
        if held.get(name) != shard_name:
            raise InputError(f"{index}: says that {name!r} is in {shard_name}, but it is not")
    extra = next((name for name in held if name not in weight_map), None)
    if extra is not None:
        raise InputError(f"{index}: {extra!r} is in {held[extra]}, but the index does not list it")


def rewritten(
    index: Mapping[str, Any],
    slots: Mapping[str, Sequence[Entry]],
    shard_of: Callable[[Entry], str],
    size_of: Callable[[Entry], int],
) -> dict[str, Any]:
    """The index with the names and totals of what is there now, in the order in which it listed them.

    Args:
        index: of the input.
        slots: what stands now where each of its names stood.
        shard_of: the file of an entry that is there now.
        size_of: its bytes.
    """
    listed = [entry for key in index["weight_map"] for entry in slots[key]]
    totals = {
        "total_size": sum(size_of(entry) for entry in listed),
        "total_parameters": sum(math.prod(entry.shape) for entry in listed),
    }
    metadata = index.get("metadata")
    new = dict(index)
    if isinstance(metadata, dict):
        new["metadata"] = metadata | {key: value for key, value in totals.items() if key in metadata}
    new["weight_map"] = {entry.name: shard_of(entry) for entry in listed}
    return new


def write(path: Path, index: Mapping[str, Any]) -> None:
    """Write an index as transformers does."""
    path.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require_outside(staging: Path, folder: Path) -> None:
    """Check that a result is not built inside its input.

    Raises:
        UsageError: it is.
    """
    if staging.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"{folder}: the output would lie inside the input; choose another -o")


def copy_others(folder: Path, target: Path, ours: Collection[str]) -> None:
    """Copy every file of a folder but `ours`: configuration, tokenizer. Nothing else stays in the target."""
    others = [path.relative_to(folder) for path in _files_below(folder)]
    kept = {*ours, *(name.as_posix() for name in others)}
    for path in list(_files_below(target)):
        # An earlier run may have been interrupted after copying what the input no longer has.
        if path.relative_to(target).as_posix() not in kept:
            path.unlink()
    for name in others:
        if name.as_posix() not in ours:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, target / name)


def _files_below(folder: Path) -> Iterator[Path]:
    """Every file of a folder, links followed."""
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        yield from (path for name in sorted(names) if (path := Path(root, name)).is_file())
