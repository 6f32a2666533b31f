"""Say what a file is that this tool cannot read, so that its owner knows what to do."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path

_START = 512


def describe(path: Path) -> str | None:
    """Return what is wrong with a file in one clause, or None if it is simply of no known format."""
    if path.is_dir():
        return "is a folder without an index of shards (model.safetensors.index.json); name the model file in it"
    with path.open("rb") as file:
        start = file.read(_START)
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself: run `git lfs pull`"
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not a model: the download went wrong"
    return None


def unreadable_archive(path: Path) -> str | None:
    """Return why a zip archive cannot be converted, or None if it is a torch file with a pickle in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "is damaged or cut short: its archive has no table of contents"
    return foreign_archive(names)


def foreign_archive(names: Iterable[str]) -> str | None:
    """The same for an archive with these records."""
    entries = {name.split("/", 1)[-1] for name in names}
    if "archive_format" in entries or "models/model.json" in entries or "serialized_exported_program.json" in entries:
        return (
            "is an exported program (.pt2), which this version cannot convert: "
            "convert the module or its state dict, then export it again"
        )
    if "constants.pkl" in entries or any(entry.startswith("code/") for entry in entries):
        return (
            "is a TorchScript archive, which this version cannot convert: "
            "convert the module or its state dict, then script or trace it again"
        )
    if "data.pkl" not in entries:
        return "is a zip archive without data.pkl, so it was not written by torch.save"
    return None
