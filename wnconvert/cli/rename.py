"""`wnconvert rename`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wnconvert.cli import options
from wnconvert.cli.conversion import convert
from wnconvert.cli.outcome import Outcome, printed
from wnconvert.ranks import Ranks
from wnconvert.sites import Scheme


@click.command(short_help="Change how the split weights are named.")
@options.file_argument("model", "MODEL")
@options.names("--to", required=True)
@options.writing
@options.selecting
@options.reporting
@printed
def rename(model: Path, names: Scheme, crew: Ranks, **given: Any) -> Outcome:
    """Rename the keys of every split weight of MODEL between torch's two spellings. No value changes.

    \b
    Example:
      wnconvert rename model.pt --to parametrized
    """
    return convert("rename", model, given, crew, names=names)
