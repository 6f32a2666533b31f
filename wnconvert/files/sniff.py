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
    entries = archive_entries(path)
    if entries is None:
        return "is damaged or cut short: its archive has no table of contents"
    return foreign_archive(entries.values())


def foreign_archive(names: Iterable[str]) -> str | None:
    """The same for an archive with these records."""
    if "data.pkl" not in {name.split("/", 1)[-1] for name in names}:
        return "is a zip archive without data.pkl, so it was not written by torch.save"
    return None


def archive_entries(path: Path) -> dict[str, str] | None:
    """The entries of a zip archive of torch, without their first folder, and their full names.

    Returns:
        None if the archive cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None
    return {name.split("/", 1)[-1]: name for name in names}
