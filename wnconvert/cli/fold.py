"""`wnconvert fold`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wnconvert.cli import options
from wnconvert.cli.conversion import convert
from wnconvert.cli.outcome import Outcome, printed
from wnconvert.ranks import Ranks


@click.command(short_help="Multiply magnitude and direction back into plain weights.")
@options.file_argument("model", "MODEL")
@options.writing
@options.selecting
@options.reporting
@printed
def fold(model: Path, crew: Ranks, **given: Any) -> Outcome:
    """Multiply every split weight of MODEL back into a plain weight, each value rounded once.

    Only the file is needed, no model code. Both spellings of torch are recognised: weight_g and weight_v, and
    parametrizations.weight.original0 and original1.

    \b
    Examples:
      wnconvert fold generator.pth.tar
      wnconvert fold checkpoint.pt -o plain.pt --optimizer drop
    """
    return convert("fold", model, given, crew)
