"""`wnconvert apply`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wnconvert.cli import options
from wnconvert.cli.conversion import convert
from wnconvert.cli.outcome import Outcome, printed
from wnconvert.ranks import Ranks
from wnconvert.sites import Scheme


@click.command(short_help="Split weights into magnitude g and direction v.")
@options.file_argument("model", "MODEL")
@options.writing
@options.selecting
@options.dim
@options.names("--names", default="legacy", show_default=True)
@options.arch
@options.reporting
@printed
def apply(model: Path, dim: Any, names: Scheme, crew: Ranks, **given: Any) -> Outcome:
    """Split each Linear, convolution, recurrent and attention weight w of MODEL into g and v, w = g * v/||v||.

    The function stays the same, and fold gives every weight back bit for bit. In a checkpoint without model code, the
    kind of a weight is told by names and shapes; inspect -v shows how.

    \b
    Examples:
      wnconvert apply model.safetensors --dry-run
      wnconvert apply model.pt --include 'encoder.*' --kind 'Conv*' -o split.pt
    """
    return convert("apply", model, given, crew, dim=options.dim_of(dim), names=names)
