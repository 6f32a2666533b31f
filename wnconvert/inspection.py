"""List the weights of a file and their magnitudes, changing nothing. Does not import torch by itself."""

from __future__ import annotations

from pathlib import Path

from wnconvert import files
from wnconvert.errors import NothingToDo
from wnconvert.files import ReadOptions
from wnconvert.report.model import Report, Row
from wnconvert.sites import Dim, Selection


def inspect_file(
    path: Path,
    reading: ReadOptions = ReadOptions(),
    *,
    selection: Selection = Selection(),
    dim: Dim = "torch",
) -> Report:
    """List every weight that the patterns choose: the ones that `apply` would leave alone as skipped, with the reason.

    Raises:
        InputError: the file cannot be read.
        UsageError: a pattern matches nothing.
        NothingToDo: the file holds no weight of a known kind.
    """
    document = files.read(path, reading)
    magnitudes = document.magnitudes()
    sites = selection.apply(document.carrier.sites(dim))
    rows = [
        Row(site, "skipped" if site.skip else "listed", site.skip, magnitude=magnitudes.get(site.name))
        for site in sites
        if selection.left_out(site) is None
    ]
    carrier = document.carrier
    report = Report("inspect", rows, carrier.walker, carrier.walker_note, input=str(path), format=document.format)
    report.notes += document.notes
    if not rows:
        none = "the patterns leave no weight" if sites else "no weight found that could be split or folded"
        raise NothingToDo(f"{path}: {none}", report)
    return report
