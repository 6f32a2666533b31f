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
        """Move every staged file to its final name, flushed to disk, the target last. A folder moves as a whole."""
        main = self.folder / self.target.name
        files = self._files()
        for path in files:
            _flush(path)
        for path in files:
            if not path.is_relative_to(main):
                final = self.target.parent / path.relative_to(self.folder)
                final.parent.mkdir(parents=True, exist_ok=True)
                path.replace(final)
        if main.is_dir() and self.target.is_dir():
            # A folder cannot be replaced in one step: the old one goes away with the staging folder.
            self.target.replace(self.folder / f".replaced.{main.name}")
        main.replace(self.target)

    def _files(self) -> list[Path]:
        # Links stand for files that already are where they belong.
        return [path for path in sorted(self.folder.rglob("*")) if path.is_file() and not path.is_symlink()]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(f"{self.target}: cannot be written ({error.strerror or error})") from error


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
