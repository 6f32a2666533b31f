"""From the parsed options of `apply`, `fold` and `rename` to a job, and back to what is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wnconvert.cli import options
from wnconvert.cli.importing import importing
from wnconvert.cli.outcome import Outcome, of_report, watching
from wnconvert.ranks import Ranks
from wnconvert.sites import Dim, Scheme


def convert(
    command: str, model: Path, given: dict[str, Any], crew: Ranks, *, dim: Dim = "torch", names: Scheme = "legacy"
) -> Outcome:
    """Convert a file as the options say."""
    with watching(given["quiet"], crew) as watcher:
        watcher.stage("starting")
        with importing():
            from wnconvert import jobs

        job = jobs.Job(
            command,
            selection=options.selection(given),
            dim=dim,
            names=names,
            reading=options.read_options(given),
            dry_run=given["dry_run"],
            overwrite=given["overwrite"],
            check=not given["no_verify"],
            resume=given["resume"],
        )
        report = jobs.convert_file(model, given["output"], job, watcher, crew)
    return of_report(report, verbose=given["verbose"], dry_run=given["dry_run"])
