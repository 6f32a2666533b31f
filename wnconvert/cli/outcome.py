"""How a verb ends: what it prints, where, and its exit code.

Standard output holds the report: the table, or one JSON object with `--json`. For an error, that object has the message
under `error` and the code under `exit_code`. Everything else goes to standard error, an error as one line. What a model
file prints while it is read (unpickling can run code) goes there too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from wnconvert import __version__
from wnconvert.errors import NothingToDo, RankDied, Stopped, WnconvertError, notes_of
from wnconvert.ranks import ALONE, Ranks
from wnconvert.watch import SILENT, Watcher

if TYPE_CHECKING:
    from wnconvert.report.model import Report

BROKEN_PIPE = 141
INTERRUPTED = 130
_UNBOUNDED = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a verb hands over to be printed.

    Attributes:
        json: as plain data.
        draw: as text, given the width in columns and whether colours show.
        code: the exit code.
    """

    json: dict[str, Any]
    draw: Callable[[int, bool], str]
    code: int = 0


def printed(verb: Callable[..., Outcome]) -> Callable[..., int]:
    """Print what a verb returns or raises, and return its exit code."""

    @functools.wraps(verb)
    def run(**given: Any) -> int:
        try:
            return _run(verb, given)
        except BrokenPipeError:
            return _abandon_stdout(BROKEN_PIPE)
        except KeyboardInterrupt as error:
            return _say("".join(["interrupted", *notes_of(error)]), INTERRUPTED, last=True)
        except Stopped as error:
            # It leaves nothing to be said but that there is a way to go on.
            for note in notes_of(error):
                _say(f"stopped{note}", 1, last=True)
            raise

    return run


@contextlib.contextmanager
def watching(quiet: bool, crew: Ranks = ALONE) -> Iterator[Watcher]:
    """Show a person at a terminal how far the work is, or how far rank 0 is."""
    if quiet or crew.rank or sys.stderr is None or not sys.stderr.isatty():
        yield SILENT
        return
    from rich.console import Console

    from wnconvert.report.progress import Bar

    with Bar(Console(file=sys.stderr)) as bar:
        yield bar


def json_of_error(message: str, code: int) -> str:
    """The object for an error before any verb has run."""
    return json.dumps({"tool": "wnconvert", "version": __version__, **_error(message, code)}, indent=2)


def of_report(report: Report, *, verbose: bool, dry_run: bool = False) -> Outcome:
    """The outcome of a verb that made a report."""

    def draw(width: int, color: bool) -> str:
        from wnconvert.report.table import report_text

        return report_text(report, width=width, color=color, verbose=verbose, dry_run=dry_run)

    return Outcome(report.to_json(), draw)


def _run(verb: Callable[..., Outcome], given: dict[str, Any]) -> int:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            outcome = verb(**given, crew=_crew())
    except NothingToDo as nothing:
        return _nothing(nothing, given)
    except (WnconvertError, OSError, MemoryError, RuntimeError) as error:
        message = _message(error)
        if message is None:
            raise
        code = error.exit_code if isinstance(error, WnconvertError) else 1
        return _fail(message, code, given, last=isinstance(error, RankDied))
    try:
        _show(given, outcome.json, outcome.draw)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _say(f"cannot write to standard output: {error.strerror}", _abandon_stdout(1))
    return outcome.code


def _message(error: Exception) -> str | None:
    """One line for an error that a person can do something about, or None for a mistake of ours."""
    if isinstance(error, WnconvertError):
        return str(error)
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    # torch has no class of its own for a failed allocation on the CPU.
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "not enough memory"
    return None


def _nothing(nothing: NothingToDo, given: dict[str, Any]) -> int:
    """Show what was found, although nothing was done with it."""
    if nothing.report is None:
        return _fail(str(nothing), nothing.exit_code, given)
    shown = of_report(nothing.report, verbose=given["verbose"], dry_run=bool(given.get("dry_run")))
    _show(given, shown.json | _error(str(nothing), nothing.exit_code), shown.draw if nothing.report.rows else None)
    return _say(str(nothing), nothing.exit_code)


def _fail(message: str, code: int, given: dict[str, Any], *, last: bool = False) -> int:
    context = click.get_current_context()
    files = [str(value) for name in ("model", "a", "b") if (value := given.get(name)) is not None]
    asked = {"tool": "wnconvert", "version": __version__, "command": context.info_name}
    which = {"input": files[0]} if len(files) == 1 else dict(zip("ab", files, strict=False))
    _show(given, {**asked, **which, **_error(message, code)}, None)
    return _say(message, code, last=last)


def _error(message: str, code: int) -> dict[str, Any]:
    return {"error": message, "exit_code": code}


def _say(message: str, code: int, *, last: bool = False) -> int:
    from wnconvert.report.text import safe

    if _crew().speaks(last=last):
        click.echo(f"wnconvert: {safe(message)}", err=True)
    return code


def _crew() -> Ranks:
    """The processes that run this command, as `cli.main` found them."""
    return click.get_current_context().find_object(Ranks) or ALONE


def _show(given: dict[str, Any], data: dict[str, Any], draw: Callable[[int, bool], str] | None) -> None:
    if _crew().rank:
        return
    if given["as_json"]:
        _write(json.dumps(_finite(data), indent=2, allow_nan=False) + "\n")
    elif draw is not None and not given["quiet"]:
        on_terminal = sys.stdout is not None and sys.stdout.isatty()
        fitted = on_terminal or "COLUMNS" in os.environ
        # In a pipe, one weight is one line, however long its name.
        width = shutil.get_terminal_size().columns if fitted else _UNBOUNDED
        _write(draw(width, on_terminal and os.environ.get("TERM") != "dumb"))


def _write(text: str) -> None:
    if sys.stdout is not None:
        sys.stdout.write(text)
        # Now, while a failure still can be told from success.
        sys.stdout.flush()


def _finite(data: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _abandon_stdout(code: int) -> int:
    """Nobody reads any more: keep Python from failing once again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return code
