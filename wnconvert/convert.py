"""The verbs, over any carrier: find the sites, select, do the arithmetic, put the result back, report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from wnconvert import weightnorm
from wnconvert.carriers import Carrier, DeferringCarrier
from wnconvert.errors import NothingToDo, NotSplittable
from wnconvert.report.model import Report, Row
from wnconvert.sites import Dim, RowCounts, Scheme, Selection, Site

_NOTHING_TO_SPLIT = "no weight to split"

_Item = TypeVar("_Item")
Progress = Callable[[Iterable[_Item]], Iterable[_Item]]
"""Wraps the loop over the sites, to show how far it is."""


def apply(
    carrier: Carrier,
    *,
    selection: Selection = Selection(),
    dim: Dim = "torch",
    names: Scheme = "legacy",
    dry_run: bool = False,
    progress: Progress[Site] = iter,
) -> Report:
    """Split every selected plain weight.

    Raises:
        UsageError: a pattern of the selection matches nothing.
        NothingToDo: no weight was split.
    """
    sites = selection.apply(carrier.sites(dim))
    deferring = carrier if isinstance(carrier, DeferringCarrier) else None
    rows = [_split(carrier, deferring, site, names, dry_run) for site in progress(sites)]
    report = Report("apply", rows, carrier.walker, carrier.walker_note, notes=_row_notes(rows))
    _require_action(report, "split", _NOTHING_TO_SPLIT)
    return report


def settle(report: Report, carrier: Carrier) -> None:
    """Complete the report of `apply` by what was found out while the carrier was saved.

    Raises:
        NothingToDo: no weight was split after all.
    """
    outcomes = carrier.outcomes() if isinstance(carrier, DeferringCarrier) else {}
    if not outcomes:
        return
    report.rows = [_settled(row, outcomes.get(row.site.name)) for row in report.rows]
    report.notes += _row_notes([row for row in report.rows if row.site.name in outcomes])
    _require_action(report, "split", _NOTHING_TO_SPLIT)


def _settled(row: Row, outcome: RowCounts | str | None) -> Row:
    if outcome is None:
        return row
    if isinstance(outcome, str):
        return Row(row.site, "skipped", outcome)
    return Row(row.site, "split", zero_rows=outcome.zero, scaled_rows=outcome.scaled)


def fold(
    carrier: Carrier,
    *,
    selection: Selection = Selection(),
    dry_run: bool = False,
    progress: Progress[Site] = iter,
) -> Report:
    """Multiply every selected pair back into a plain weight. Plain weights are not listed.

    Raises:
        PairError: a pair cannot be multiplied; the message names it. Where the weight is made while it is saved, saving
            raises it.
        UsageError: a pattern of the selection matches nothing.
        NothingToDo: nothing is split.
    """
    sites = [site for site in carrier.sites("torch") if site.state == "split"]
    # Folding twice is no mistake, so a pattern may match nothing where nothing is split.
    deferring = carrier if isinstance(carrier, DeferringCarrier) else None
    rows = [_fold(carrier, deferring, site, dry_run) for site in progress(selection.apply(sites) if sites else [])]
    report = Report("fold", rows, carrier.walker, carrier.walker_note)
    _require_action(report, "folded", "nothing to fold" if rows else "nothing to fold: no weight is split")
    return report


def rename(
    carrier: Carrier,
    scheme: Scheme,
    *,
    selection: Selection = Selection(),
    dry_run: bool = False,
) -> Report:
    """Spell the keys of every selected pair in another scheme. No value changes.

    Raises:
        UsageError: a pattern of the selection matches nothing.
        NothingToDo: nothing is split, or everything is spelled so already.
    """
    rows = []
    for site in selection.apply([site for site in carrier.sites("torch") if site.state == "split"]):
        if site.skip or site.scheme == scheme:
            rows.append(Row(site, "skipped", site.skip or f"already {scheme}"))
            continue
        if not dry_run:
            carrier.rename(site, scheme)
        rows.append(Row(site, "renamed"))
    report = Report("rename", rows, carrier.walker, carrier.walker_note)
    _require_action(report, "renamed", "nothing to rename")
    return report


def _split(carrier: Carrier, deferring: DeferringCarrier | None, site: Site, names: Scheme, dry_run: bool) -> Row:
    if site.state == "split":
        return Row(site, "skipped", site.skip or f"already split ({site.scheme or 'in the graph'})")
    if site.skip:
        return Row(site, "skipped", site.skip)
    if dry_run or (deferring is not None and deferring.defer_split(site, names)):
        return Row(site, "split")
    try:
        g, v = weightnorm.split(
            carrier.read_weight(site), site.axis, groups=site.groups, name=site.name, g_dtype=carrier.g_dtype(site)
        )
    except NotSplittable as error:
        return Row(site, "skipped", str(error))
    carrier.put_pair(site, g, v, names)
    counts = weightnorm.row_counts(g, v.dtype)
    return Row(site, "split", zero_rows=counts.zero, scaled_rows=counts.scaled)


def _fold(carrier: Carrier, deferring: DeferringCarrier | None, site: Site, dry_run: bool) -> Row:
    if site.skip:
        return Row(site, "skipped", site.skip)
    if dry_run or (deferring is not None and deferring.defer_fold(site)):
        return Row(site, "folded")
    g, v = carrier.read_pair(site)
    carrier.put_weight(site, lambda: weightnorm.fold(g, v, name=site.name))
    return Row(site, "folded")


def _row_notes(rows: list[Row]) -> list[str]:
    zero = sum(row.zero_rows for row in rows)
    scaled = sum(row.scaled_rows for row in rows)
    notes = []
    if zero:
        notes.append(f"{_rows(zero)} of zeros got g = 0 and a random direction, so that they can train")
    if scaled:
        notes.append(f"{_rows(scaled)} had v scaled by a power of two, so that no runtime under- or overflows")
    return notes


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _require_action(report: Report, action: str, message: str) -> None:
    if any(row.action == action for row in report.rows):
        return
    reasons = sorted({row.reason for row in report.rows if row.reason})
    shown = "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
    raise NothingToDo(f"{message}{f' ({shown})' if shown else ''}", report)
