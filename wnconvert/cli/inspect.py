"""`wnconvert inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wnconvert.cli import options
from wnconvert.cli.outcome import Outcome, of_report, printed, watching
from wnconvert.ranks import Ranks


@click.command(short_help="List every weight: kind, shape, axis, state, magnitudes.")
@options.file_argument("model", "MODEL")
@options.selecting
@options.dim
@options.arch
@options.reporting
@printed
def inspect(model: Path, dim: Any, crew: Ranks, **given: Any) -> Outcome:
    """List every weight of MODEL: kind, shape, the axis that keeps a magnitude, whether it is split, and why apply
    would leave it alone. Split weights show the smallest, median and largest magnitude. Nothing is written.

    \b
    Examples:
      wnconvert inspect generator.pth.tar
      wnconvert inspect model.safetensors --kind Linear -v
    """
    with watching(given["quiet"], crew) as watcher:
        watcher.stage("reading")
        from wnconvert.inspection import inspect_file

        reading, selection = options.read_options(given), options.selection(given)
        report = crew.first(lambda: inspect_file(model, reading, selection=selection, dim=options.dim_of(dim)))
    return of_report(report, verbose=given["verbose"])
