"""`wnconvert verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wnconvert.cli import options
from wnconvert.cli.importing import importing
from wnconvert.cli.outcome import Outcome, printed, watching
from wnconvert.errors import VerificationError
from wnconvert.ranks import Ranks


@click.command(short_help="Tell whether two files are the same function.")
@options.file_argument("a", "A")
@options.file_argument("b", "B")
@options.reporting
@printed
def verify(a: Path, b: Path, crew: Ranks, **given: Any) -> Outcome:
    """Tell whether A and B are the same function: by weights, split ones multiplied back, and by outputs on random
    inputs where both can be run.

    The same means that each weight is within 1 ulp (one unit in the last place; identical bits are counted apart) and
    that outputs agree within the printed tolerance. Formats may differ, and so may a leading part that all names of one
    side share, such as "generator.". Exit code 0 if the same, 3 if not.

    \b
    Example:
      wnconvert verify generator.pth.tar generator.folded.pth.tar
    """
    with watching(given["quiet"], crew) as watcher:
        watcher.stage("starting")
        with importing():
            from wnconvert.compare import compare_files

        verdict = compare_files(a, b, options.read_options(given), watcher, crew)

    def draw(width: int, color: bool) -> str:
        from wnconvert.report.verdict_text import verdict_text

        return verdict_text(verdict, width=width, color=color, verbose=given["verbose"])

    return Outcome(verdict.to_json(), draw, 0 if verdict.same else VerificationError.exit_code)
