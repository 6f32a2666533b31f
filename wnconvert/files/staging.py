"""A result is built in a hidden folder beside its target and moved to its name when it is complete and checked."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from wnconvert.errors import InputError, VerificationError

FINISHED = ".finished"
"""In a staging folder: notes on the parts of the output that are complete."""


def partial_folder(target: Path) -> Path:
    """Where an output that can be resumed is built."""
    return target.with_name(f".{target.name}.partial.wnconvert")


class Staging:
    """Context manager around the making of one output.

    Everything written into `folder` moves beside the target on `commit`, the target itself last, so that a file under
    the final name is always whole. Without `commit`, nothing is left, but what a later run can go on from. A killed
    process leaves at most the hidden folder, `.NAME.*.wnconvert`.
    """

    def __init__(self, target: Path, *, partial: bool = False, resume: bool = False) -> None:
        """Prepare for one output.

        Args:
            target: its final name.
            partial: a failed run leaves behind what it noted as `FINISHED`.
            resume: go on from that; otherwise it is thrown away.
        """
        self.target = target
        self.folder = Path()
        self._partial, self._resume = partial, resume
        self._committed = False

    def __enter__(self) -> Staging:
        try:
            self.folder = self._make()
        except OSError as error:
            raise InputError(f"{self.target.parent}: cannot write here ({error.strerror})") from error
        return self

    def _make(self) -> Path:
        if not self._partial:
            parent = self.target.parent
            return Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", suffix=".wnconvert", dir=parent))
        folder = partial_folder(self.target)
        if not self._resume:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, exist_ok=self._resume)
        return folder

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
        self._committed = True

    def _files(self) -> list[Path]:
        # Links stand for files that already are where they belong.
        return [path for path in sorted(self.folder.rglob("*")) if self._belongs(path)]

    def _belongs(self, path: Path) -> bool:
        notes = self.folder / FINISHED
        return path.is_file() and not path.is_symlink() and not path.is_relative_to(notes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = error is not None and not self._committed and self._partial and (self.folder / FINISHED).is_dir()
        if not kept or isinstance(error, VerificationError):
            shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError):
            way = "; --resume goes on from what is done" if kept else ""
            raise InputError(f"{self.target}: cannot be written ({error.strerror or error}){way}") from error


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
