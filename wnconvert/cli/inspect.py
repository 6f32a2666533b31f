"""`wnconvert inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from wnconvert.cli import options
from wnconvert.cli.outcome import Outcome, of_report, printed, watching


@click.command(short_help="List every weight: kind, shape, axis, state, magnitudes.")
@options.file_argument("model", "MODEL")
@options.selecting
@options.dim
@options.arch
@options.reporting
@printed
def inspect(model: Path, dim: Any, **given: Any) -> Outcome:
    """List every weight of MODEL: kind, shape, the axis that keeps a magnitude, whether it is split, and why apply
    would leave it alone. Split weights show the smallest, median and largest magnitude. Nothing is written.

    \b
    Examples:
      wnconvert inspect generator.pth.tar
      wnconvert inspect model.safetensors --kind Linear -v
    """
    with watching(given["quiet"]) as watcher:
        watcher.stage("reading")
        from wnconvert.inspection import inspect_file

        report = inspect_file(
            model, options.read_options(given), selection=options.selection(given), dim=options.dim_of(dim)
        )
    return of_report(report, verbose=given["verbose"])
