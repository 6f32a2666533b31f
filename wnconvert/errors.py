"""Every error the tool raises on purpose. Each message is one line a person can act on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wnconvert.report.model import Report


class WnconvertError(Exception):
    """Base class. `exit_code` is what the command line returns for it."""

    exit_code = 1


class InputError(WnconvertError):
    """The input is damaged, of an unknown format, or cannot be written back."""


class RankDied(InputError):
    """Another process that works on the same command is gone."""


class UsageError(WnconvertError):
    """The request itself makes no sense for this input (a pattern that matches nothing, an unknown axis)."""

    exit_code = 2


class VerificationError(WnconvertError):
    """The result is not the same function as the input. Nothing has been written."""

    exit_code = 3


class NothingToDo(WnconvertError):
    """No weight was selected, or nothing is split. `report` says what was found."""

    exit_code = 4

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


class NotSplittable(WnconvertError):
    """This one weight has no exact weight-normalized form. The site is skipped with this reason."""


class PairError(InputError):
    """`g` and `v` do not describe a weight (shapes, dtypes, NaN, a zero direction with g != 0)."""


class Stopped(SystemExit):
    """A signal told the process to stop. What calls somebody's code tells it by this from an exit of that code."""


def add_note(error: BaseException, text: str) -> None:
    """Add a line to an exception, as its method of that name does from Python 3.11 on."""
    error.__dict__.setdefault("__notes__", []).append(text)


def notes_of(error: BaseException) -> list[str]:
    """The lines that were added to an exception."""
    return list(error.__dict__.get("__notes__", []))
