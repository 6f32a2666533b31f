"""Outcomes on disk: one JSON object a line, so that a run that was cut off goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]


def fingerprint(package: Path) -> str:
    """A checksum of the source of the tool: results of another version of it are no results of this one."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def load(path: Path) -> dict[tuple[str, str], Record]:
    """The last record of every library and name. A line that was cut off is ignored."""
    found: dict[tuple[str, str], Record] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[record["library"], record["name"]] = record
    return found


def append(path: Path, record: Record) -> None:
    """Add one record."""
    with path.open("a") as stream:
        stream.write(json.dumps(record) + "\n")


def failed(record: Record) -> bool:
    """Whether a record is worth another try."""
    return bool(not record.get("built") or record["wrong"] or record["missed"])


def left(
    tasks: Iterable[tuple[str, str]], done: Mapping[tuple[str, str], Record], tool: str, *, retry: bool
) -> list[tuple[str, str]]:
    """The tasks that are still to do.

    Args:
        tasks: all of them.
        done: what is recorded.
        tool: fingerprint; records of another one do not count, unless only failures are to be tried again.
        retry: try exactly those again that failed, or that nothing is recorded of.
    """
    if retry:
        return [task for task in tasks if task not in done or failed(done[task])]
    return [task for task in tasks if task not in done or done[task].get("tool") != tool]
