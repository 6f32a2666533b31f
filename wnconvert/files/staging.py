"""A result is built in a hidden folder beside its target and moved to its name when it is complete and checked."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from wnconvert.errors import InputError


class Staging:
    """Context manager around the making of one output.

    Everything written into `folder` moves beside the target on `commit`, the target itself last, so that a file under
    the final name is always whole. Without `commit`, nothing is left. A killed process leaves at most the hidden
    folder, `.NAME.*.wnconvert`.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = Path()

    def __enter__(self) -> Staging:
        try:
            made = tempfile.mkdtemp(prefix=f".{self.target.name}.", suffix=".wnconvert", dir=self.target.parent)
        except OSError as error:
            raise InputError(f"{self.target.parent}: cannot write here ({error.strerror})") from error
        self.folder = Path(made)
        return self

    def sizes(self) -> dict[str, int]:
        """Bytes of every staged file, by its final name."""
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in self._files()}

    def commit(self) -> None:
        """Move every staged file to its final name, flushed to disk, the target last."""
        for path in sorted(self._files(), key=lambda path: path.name == self.target.name):
            final = self.target.parent / path.relative_to(self.folder)
            final.parent.mkdir(parents=True, exist_ok=True)
            _flush(path)
            path.replace(final)

    def _files(self) -> list[Path]:
        # Links stand for files that already are where they belong.
        return [path for path in sorted(self.folder.rglob("*")) if path.is_file() and not path.is_symlink()]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"{self.target}: cannot be written ({error.strerror or error})") from error


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files(path))


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
