"""A result is built in a hidden folder beside its target and moved to its name when it is complete and checked."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from wnconvert.errors import (
    InputError,
    NothingToDo,
    PairError,
    RankDied,
    Stopped,
    VerificationError,
    WnconvertError,
    add_note,
)
from wnconvert.files import lock
from wnconvert.files.lock import Lock
from wnconvert.ranks import ALONE, Ranks

FINISHED = ".finished"
"""In a staging folder: notes on the parts of the output that are complete."""

_FOR_GOOD = (VerificationError, NothingToDo, PairError)
"""Failures that a second attempt at the same input would meet again."""


def partial_folder(target: Path) -> Path:
    """Where an output that can be resumed is built."""
    return target.with_name(f".{target.name}.partial.wnconvert")


class Staging:
    """Context manager around the making of one output.

    Everything written into `folder` moves beside the target on `commit`, the target itself last, so that a file under
    the final name is always whole. Without `commit`, nothing is left, but what a later run can go on from. A killed
    process leaves at most the hidden folder, `.NAME.*.wnconvert`.
    """

    def __init__(self, target: Path, *, partial: bool = False, resume: bool = False, crew: Ranks = ALONE) -> None:
        """Prepare for one output.

        Args:
            target: its final name.
            partial: a failed run leaves behind what it noted as `FINISHED`.
            resume: go on from that; otherwise it is thrown away.
            crew: the processes that work on it, each of which enters a `Staging` of its own. Several need `partial`.
        """
        self.target = target
        # This process may stand in the folder that is replaced, and would not find the new one from there.
        self._final = target.parent.resolve() / target.name
        self.folder = Path()
        self._partial, self._resume, self._crew = partial, resume, crew
        self._lock: Lock | None = None
        self._committed = False

    def __enter__(self) -> Staging:
        try:
            if not self._partial:
                parent = self._final.parent
                self.folder = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.", suffix=".wnconvert", dir=parent))
                return self
            self.folder = partial_folder(self._final)
            self._crew.first(self._begin)
            # All hold the lock: while one of them lives, it writes.
            self._crew.agreed(self._follow)
        except OSError as error:
            self._abandon()
            raise InputError(f"{self.target.parent}: cannot write here ({error.strerror})") from error
        except WnconvertError:
            self._abandon()
            raise
        return self

    def _begin(self) -> None:
        self._lock = lock.take(self.folder, exclusive=True)
        if self._lock is None:
            raise self._taken()
        if not self._resume:
            for path in self.folder.iterdir():
                if path.name != lock.NAME:
                    _remove(path)
        if self._crew.count > 1 and not self._lock.share():
            raise self._taken()

    def _follow(self) -> None:
        if self._crew.rank:
            self._lock = lock.take(self.folder, exclusive=False)
            if self._lock is None:
                raise self._taken()

    def _taken(self) -> InputError:
        return InputError(f"{self.target}: another run is writing it, in {self.folder.name}; wait until it has ended")

    def _abandon(self) -> None:
        if self._lock is not None and self._crew.rank == 0 and [p.name for p in self.folder.iterdir()] == [lock.NAME]:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def sizes(self) -> dict[str, int]:
        """Bytes of every staged file, by its final name."""
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in self._files()}

    def commit(self) -> None:
        """Move every staged file to its final name, flushed to disk, the target last. A folder moves as a whole."""
        # Whoever still looks at the staged files must be done.
        self._crew.together(lambda: None)
        try:
            self._crew.first(self._move)
        except RankDied:
            # A rank that dies now comes too late to fail the run.
            if not self._committed:
                raise
        self._committed = True

    def _move(self) -> None:
        main = self.folder / self.target.name
        files = self._files()
        for path in files:
            _flush(path)
        for path in files:
            if not path.is_relative_to(main):
                final = self._final.parent / path.relative_to(self.folder)
                final.parent.mkdir(parents=True, exist_ok=True)
                path.replace(final)
        _replace(main, self._final, self.folder / f".replaced.{main.name}")
        self._committed = True

    def _files(self) -> list[Path]:
        # Links stand for files that already are where they belong.
        return [path for path in sorted(self.folder.rglob("*")) if self._belongs(path)]

    def _belongs(self, path: Path) -> bool:
        ours = path.is_relative_to(self.folder / FINISHED) or path == self.folder / lock.NAME
        return path.is_file() and not path.is_symlink() and not ours

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = self._is_worth_keeping(error)
        if not kept and self._crew.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._release()
        way = "; --resume goes on from what is done" if kept else ""
        if isinstance(error, OSError):
            raise InputError(f"{self.target}: cannot be written ({error.strerror or error}){way}") from error
        if isinstance(error, RankDied):
            raise RankDied(f"{error}{way or ', and nothing was written'}") from error
        if way and isinstance(error, (KeyboardInterrupt, Stopped)):
            add_note(error, way)

    def _is_worth_keeping(self, error: BaseException | None) -> bool:
        if error is None or self._committed or not self._partial or isinstance(error, _FOR_GOOD):
            return False
        # Without the second, rank 0 died after it had moved the result.
        return (self.folder / FINISHED).is_dir() and (self.folder / self.target.name).exists()


def _replace(new: Path, target: Path, aside: Path) -> None:
    """Give a file or folder its final name. A folder cannot be replaced in one step: the old one is put aside."""
    old = new.is_dir() and target.is_dir()
    if old:
        target.replace(aside)
    try:
        new.replace(target)
    except OSError:
        if old:
            aside.replace(target)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
