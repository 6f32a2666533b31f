"""Tables of weights: one line for each, or one line for all of a kind that went the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from wnconvert.report import text
from wnconvert.report.model import MagnitudeStatistics, Row
from wnconvert.sites import element_count

_NARROWEST = 16
"""Columns that names get in any case."""

_ACTION_STYLE = {"split": "green", "folded": "green", "renamed": "green", "skipped": "yellow", "listed": ""}


def by_kind(rows: Sequence[Row]) -> Table:
    """One line for all weights of one kind with one action and reason."""
    groups: dict[tuple[str, str, str | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.site.kind, row.action, row.reason), []).append(row)
    reasons = ["*REASON"] if any(row.reason for row in rows) else []
    table = _table("KIND", ">WEIGHTS", ">VALUES", "ACTION", *reasons)
    for (kind, action, reason), members in sorted(groups.items(), key=lambda group: group[0][1] == "skipped"):
        table.add_row(
            Text(text.safe(kind)),
            Text(f"{len(members):,}"),
            Text(f"{sum(element_count(row.site) for row in members):,}"),
            Text(action, _ACTION_STYLE[action]),
            *(Text(text.safe(f"{reason}: {_names(members)}") if reason else "") for _ in reasons),
        )
    return table


def by_weight(rows: Sequence[Row], width: int, verbose: bool, inspecting: bool) -> list[RenderableType]:
    """One line for each weight; what is too long for a column stands below, numbered.

    The magnitudes make a table of their own where the width does not hold both.
    """
    notes = _Footnotes()
    marks = [notes.number(_remarks(row, verbose)) for row in rows]
    columns = [*_site_columns(rows, inspecting), _Column("NOTE", [Text(mark) for mark in marks])]
    magnitudes = _magnitude_columns(rows)
    tables = [[*columns[:-1], *magnitudes, columns[-1]]]
    split = [i for i, row in enumerate(rows) if row.magnitude]
    if split and _width(_draw(tables[0])) > width:
        names = [columns[0], *magnitudes]
        tables = [columns, [dataclasses.replace(c, cells=[c.cells[i] for i in split]) for c in names]]
    shown: list[RenderableType] = []
    for table in tables:
        shown += [_draw(_fitted(table, width)), ""]
    return [*shown, notes.table()] if notes.texts else shown[:-1]


@dataclasses.dataclass(frozen=True, slots=True)
class _Column:
    title: str
    cells: list[Text]


class _Footnotes:
    """Texts that several lines share, each with one number."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}

    def number(self, remarks: Sequence[str]) -> str:
        return " ".join(str(self.texts.setdefault(remark, len(self.texts) + 1)) for remark in remarks)

    def table(self) -> Table:
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        for remark, number in self.texts.items():
            table.add_row(Text(str(number)), Text(text.safe(remark)))
        return table


def _site_columns(rows: Sequence[Row], inspecting: bool) -> list[_Column]:
    sites = [row.site for row in rows]
    columns = [
        _Column("NAME", [Text(text.safe(site.name)) for site in sites]),
        _Column("KIND", [Text(text.safe(site.kind)) for site in sites]),
        _Column(">SHAPE", [Text(text.shape(site.shape)) for site in sites]),
        _Column("AXIS", [Text(text.axis(site.axis, site.groups)) for site in sites]),
    ]
    if len({site.dtype for site in sites}) > 1:
        columns.append(_Column("DTYPE", [Text(site.dtype) for site in sites]))
    if inspecting:
        columns.append(_Column("STATE", [Text(site.state, "cyan" if site.state == "split" else "") for site in sites]))
    else:
        columns.append(_Column("ACTION", [Text(row.action, _ACTION_STYLE[row.action]) for row in rows]))
    return columns


def _magnitude_columns(rows: Sequence[Row]) -> list[_Column]:
    found = [row.magnitude for row in rows]
    if not any(found):
        return []

    def cells(attribute: str) -> list[Text]:
        return [Text("" if m is None else text.number(getattr(m, attribute))) for m in found]

    columns = [
        _Column(">MIN G", cells("minimum")),
        _Column(">MEDIAN", cells("median")),
        _Column(">MAX", cells("maximum")),
    ]
    columns += [_Column(f">{label}", cells(label.lower())) for label in ("NEGATIVE", "ZERO") if _any(found, label)]
    return columns


def _any(found: Sequence[MagnitudeStatistics | None], label: str) -> bool:
    return any(m is not None and getattr(m, label.lower()) for m in found)


def _remarks(row: Row, verbose: bool) -> list[str]:
    site = row.site
    remarks = [row.reason] if row.reason else []
    if site.tied:
        remarks.append(f"also named {', '.join(site.tied)}")
    if verbose and site.scheme:
        remarks.append(f"{site.scheme} names")
    if verbose and site.evidence:
        remarks.append(site.evidence)
    if verbose and row.zero_rows:
        remarks.append(f"rows of zeros: {row.zero_rows}")
    if verbose and row.scaled_rows:
        remarks.append(f"rows with v scaled: {row.scaled_rows}")
    return remarks


def _draw(columns: Sequence[_Column]) -> Table:
    used = [column for column in columns if column.title != "NOTE" or any(cell.plain for cell in column.cells)]
    table = _table(*(column.title for column in used))
    for cells in zip(*(column.cells for column in used), strict=True):
        table.add_row(*cells)
    return table


def _table(*titles: str) -> Table:
    """An unruled table. `>` before a title aligns to the right, `*` lets that column wrap by words."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        free = title.startswith("*") or title == "NAME"
        table.add_column(
            title.lstrip(">*"), justify="right" if title[0] == ">" else "left", no_wrap=not free, overflow="fold"
        )
    return table


def _fitted(columns: Sequence[_Column], width: int) -> list[_Column]:
    """Break the names where the table would be too wide."""
    names = columns[0]
    longest = max(len(name.plain) for name in names.cells)
    room = max(_NARROWEST, width - (_width(_draw(columns)) - longest))
    if longest <= room:
        return list(columns)
    broken = [Text(text.broken(name.plain, room)) for name in names.cells]
    return [dataclasses.replace(names, cells=broken), *columns[1:]]


def _width(table: Table) -> int:
    console = Console(width=1 << 16)
    return console.measure(table).maximum


def _names(rows: Sequence[Row]) -> str:
    more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
    return f"{rows[0].site.name}{more}"
